"""Triton's side of a policy: a prompt in, a sampled response out.

This file travels into each exported version and imports nothing of the repository, so `draw` and the decoding are
copies of those in `models/sampling.py` and `models/decoding.py`, with temperature and top_p of each row's own; a test
holds the two together.
Beside it an export puts `weights/` (safetensors, config.json, tokenizer), `template.jinja` and `settings.json`.

A request holds `prompt`, a text, or `messages`, the JSON text of [{"role", "content"}, ...]; `template.jinja` turns
either into what the model reads. A token is drawn by inverting the cumulative distribution at a uniform number that
depends on the row's seed alone, so a response does not depend on the batch around it, rounding apart.

Left out on purpose: streaming and continuous batching, which vLLM does for the same weights.
"""

import json
import math
import os
import secrets

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

TEMPERATURE, TOP_P = 1.0, 1.0
"""Of a request that names none: the whole distribution, as the policy was trained."""
LEAST_TEMPERATURE = 0.001
"""The least above 0: logits that are divided by less may leave float32."""
LEAST_LONGEST, BYTES_PER_TOKEN = 1 << 18, 64
"""Bytes of the longest prompt that is read: so many for each token of the context, and no less than LEAST_LONGEST.
All of a text is tokenized before its tokens are counted, and the requests of its batch wait."""


class RefusedPrompt(Exception):
    """A prompt that this model cannot answer, however often it is sent."""


class TritonPythonModel:
    """The class that Triton's python backend looks for."""

    def initialize(self, args):
        """Load the weights of this version and no code but transformers' own. Threads: OMP_NUM_THREADS."""
        folder = os.path.join(args["model_repository"], args["model_version"])
        weights = os.path.join(folder, "weights")
        with open(os.path.join(folder, "settings.json"), encoding="utf-8") as file:
            self.settings = json.load(file)
        with open(os.path.join(folder, "template.jinja"), encoding="utf-8", newline="") as file:
            self.template = file.read()
        self.tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True, trust_remote_code=False)
        on_gpu = args["model_instance_kind"] == "GPU"
        model, report = AutoModelForCausalLM.from_pretrained(
            weights,
            dtype="auto" if on_gpu else torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"]))
            raise pb_utils.TritonModelException(f"{weights} lacks {missing}, so noise would be served: export it again")
        self.model = model.to(torch.device(f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu")).eval()
        try:
            self.decode([self.row({"prompt": b"canary", "max_new_tokens": 1, "seed": 0})])
        except RefusedPrompt as error:
            raise pb_utils.TritonModelException(f"this version cannot answer a plain prompt: {error}") from error

    def execute(self, requests):
        """Decode the prompts of all requests together; one response per request, in order."""
        rows, slices, errors = [], [], []
        for request in requests:
            start = len(rows)
            if request.is_cancelled():
                slices.append(slice(start, start))
                errors.append(triton_error("its client has given up", pb_utils.TritonError.CANCELLED))
                continue
            try:
                rows += [self.row(values) for values in read(request)]
                errors.append(None)
            except RefusedPrompt as error:
                errors.append(triton_error(error, pb_utils.TritonError.INVALID_ARG))
            # An error that leaves `execute` fails every request of the batch.
            except Exception as error:
                errors.append(triton_error(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL))
            slices.append(slice(start, len(rows)))
        responses = self.answers(rows)
        return [
            pb_utils.InferenceResponse(output_tensors=[], error=error)
            if error is not None
            else respond(responses[where])
            for where, error in zip(slices, errors, strict=True)
        ]

    def answers(self, rows):
        """What `decode` gives to each row. Where a batch fails its halves are tried, at last each row by itself."""
        if not rows:
            return []
        try:
            return self.decode(rows)
        # Of many types: memory, probabilities that are not finite, a token that the model has no weights for.
        except Exception as error:
            if len(rows) == 1:
                return [error]
        half = len(rows) // 2
        return self.answers(rows[:half]) + self.answers(rows[half:])

    def row(self, values):
        """One prompt's token ids and how to answer it, all checked. Raises RefusedPrompt."""
        settings = self.settings
        size, limit = len(values.get("prompt", values.get("messages"))), BYTES_PER_TOKEN * settings["context"]
        if size > max(LEAST_LONGEST, limit):
            raise RefusedPrompt(f"it has {size} bytes, and this version reads at most {max(LEAST_LONGEST, limit)}")
        text = self.render(messages_of(values))
        ids = self.tokenizer(text, add_special_tokens=settings["add_special_tokens"], verbose=False)["input_ids"]
        longest = values.get("max_new_tokens", max(1, min(settings["max_new_tokens"], settings["context"] - len(ids))))
        temperature, top_p = values.get("temperature", TEMPERATURE), values.get("top_p", TOP_P)
        if not ids:
            raise RefusedPrompt("it has no tokens")
        if not 1 <= longest <= settings["max_new_tokens"]:
            raise RefusedPrompt(f"max_new_tokens ({longest}) must be from 1 to {settings['max_new_tokens']}")
        if len(ids) + longest > settings["context"]:
            raise RefusedPrompt(
                f"its {len(ids)} tokens and max_new_tokens ({longest}) exceed the model's {settings['context']}"
            )
        if not (math.isfinite(temperature) and (temperature == 0 or temperature >= LEAST_TEMPERATURE)):
            raise RefusedPrompt(
                f"temperature ({temperature}) must be 0, which takes the likeliest token, or >= {LEAST_TEMPERATURE}"
            )
        if not 0 < top_p <= 1:
            raise RefusedPrompt(f"top_p ({top_p}) must be above 0 and at most 1")
        seed = values.get("seed", secrets.randbits(63))
        if seed < 0:
            raise RefusedPrompt(f"seed ({seed}) must be 0 or above")
        numbers = np.random.Generator(np.random.Philox(key=seed)).random(longest)
        return {"ids": ids, "numbers": numbers, "temperature": temperature, "top_p": top_p}

    def render(self, messages):
        """The text that the model reads. Raises RefusedPrompt."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
            # JSON can carry half a surrogate pair, which no tokenizer accepts.
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RefusedPrompt("holds half a surrogate pair, which is not text") from error
        except (TemplateError, TypeError, ValueError) as error:
            raise RefusedPrompt(f"template.jinja refuses it: {error}") from error
        return text

    def decode(self, rows):
        """Text, finish reason and number of tokens, the ending one included, of each row's response."""
        device = self.model.device
        sampled = sample(self.model, rows, torch.tensor(self.settings["eos_ids"], device=device))
        return [
            (self.text(row["ids"], tokens), reason, len(tokens))
            for row, (tokens, reason) in zip(rows, sampled, strict=True)
        ]

    def text(self, prompt_ids, response_ids):
        """A response as it continues its prompt: SentencePiece drops the leading space of a text by itself."""
        before = self.tokenizer.decode(prompt_ids, skip_special_tokens=True)
        whole = self.tokenizer.decode([*prompt_ids, *response_ids], skip_special_tokens=True)
        if whole.startswith(before):
            return whole[len(before) :]
        return self.tokenizer.decode(response_ids, skip_special_tokens=True)


@torch.inference_mode()
def sample(model, rows, eos):
    """Token ids and finish reason ("stop" or "length") of each row, all decoded as one batch."""
    device = eos.device
    width, room = max(len(row["ids"]) for row in rows), max(len(row["numbers"]) for row in rows)
    ids = torch.full((len(rows), width), int(eos[0]))
    mask = torch.zeros(len(rows), width + room, dtype=torch.long)
    mask[:, width:] = 1
    numbers = torch.ones(len(rows), room, dtype=torch.float64)
    for i, row in enumerate(rows):
        ids[i, width - len(row["ids"]) :] = torch.tensor(row["ids"])
        mask[i, width - len(row["ids"]) :] = 1
        numbers[i, : len(row["numbers"])] = torch.from_numpy(row["numbers"])
    mask, numbers = mask.to(device), numbers.to(device)
    temperature, top_p = (torch.tensor([row[k] for row in rows], device=device) for k in ("temperature", "top_p"))
    lengths = torch.tensor([len(row["numbers"]) for row in rows], device=device)
    tokens = torch.full((len(rows), room), int(eos[0]), device=device)
    alive = torch.arange(len(rows), device=device)  # which row each row of the batch is
    positions = mask[:, :width].sum(-1, keepdim=True)
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask[:, :width],
        position_ids=(mask[:, :width].cumsum(-1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    for t in range(room):
        drawn = draw(output.logits[:, -1], numbers[alive, t], temperature[alive], top_p[alive])
        tokens[alive, t] = drawn
        on = ~torch.isin(drawn, eos) & (lengths[alive] > t + 1)
        if not bool(on.any()):
            break
        if not bool(on.all()):
            keep = on.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            alive, drawn = alive[keep], drawn[keep]
        output = model(
            input_ids=drawn[:, None],
            attention_mask=mask[alive, : width + t + 1],
            position_ids=positions[alive] + t,
            past_key_values=cache,
            use_cache=True,
        )
    ends = set(eos.tolist())
    return [finish(row[: int(n)], ends) for row, n in zip(tokens.tolist(), lengths, strict=True)]


def draw(logits, uniforms, temperature, top_p):
    """One token a row by inverse CDF; at temperature 0 the likeliest. Shape: (B, V), the others (B,); returns (B,)."""
    greedy = temperature == 0
    probabilities = torch.softmax(logits.float() / torch.where(greedy, 1.0, temperature)[:, None], dim=-1)
    if bool((top_p < 1).any()):
        ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        outside = (before >= top_p[:, None] * ranked.sum(-1, keepdim=True)) & (top_p < 1)[:, None]
        probabilities = torch.zeros_like(probabilities).scatter(-1, ids, ranked.masked_fill(outside, 0))
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    if not bool(torch.isfinite(total).all()):
        raise RuntimeError("the policy's probabilities are not finite: these weights cannot be served")
    # Strictly below the total, so that rounding never lands past the last token that may be drawn.
    target = torch.minimum(uniforms.to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return torch.where(greedy, logits.argmax(-1), drawn)


def finish(tokens, ends):
    """The tokens up to the ending one, and why they end."""
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1], "stop"
    return tokens, "length"


def read(request):
    """The inputs of each row of one request, those alone that were sent. Raises RefusedPrompt."""
    found = {}
    for name in ("prompt", "messages", "max_new_tokens", "temperature", "top_p", "seed"):
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is not None:
            found[name] = tensor.as_numpy().reshape(-1).tolist()
    if len({"prompt", "messages"} & set(found)) != 1:
        raise RefusedPrompt("give either prompt or messages")
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


def messages_of(values):
    """The conversation that waits for an answer; a plain prompt is one message of the user. Raises RefusedPrompt."""
    try:
        if "prompt" in values:
            return [{"role": "user", "content": values["prompt"].decode("utf-8")}]
        messages = json.loads(values["messages"].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RefusedPrompt("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise RefusedPrompt(f"messages are not JSON ({error})") from error
    if not isinstance(messages, list) or not messages:
        raise RefusedPrompt('messages must be a non-empty list of {"role", "content"}')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise RefusedPrompt('each message needs a "role" and a "content", both strings')
    return messages


def respond(responses):
    """One request's answer; an error where one of its rows has one."""
    failed = next((one for one in responses if isinstance(one, Exception)), None)
    if failed is not None:
        error = triton_error(f"{type(failed).__name__}: {failed}", pb_utils.TritonError.INTERNAL)
        return pb_utils.InferenceResponse(output_tensors=[], error=error)
    columns = {"text": np.object_, "finish_reason": np.object_, "num_tokens": np.int32}
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor(name, np.array(values, dtype=kind).reshape(-1, 1))
            for (name, kind), values in zip(columns.items(), zip(*responses, strict=True), strict=True)
        ]
    )


def triton_error(error, code):
    """An error for one request. Its text may quote what was sent, and TritonError holds no half surrogate pair."""
    return pb_utils.TritonError(str(error).encode("utf-8", "replace").decode()[:1000], code)
