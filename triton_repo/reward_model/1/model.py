"""Triton's side of the reward model: conversations in, one reward and one token count each out.

This file travels into each exported version and imports nothing of the repository, so `render`, `encode` and
`micro_batches` are copies of those in `models/reward_model.py`; a test holds the two together. Beside it an export
puts `weights/` (safetensors, config.json, tokenizer), `template.jinja`, `settings.json` and, where ONNX Runtime
computes, `model.onnx`.

A conversation is JSON: `[{"role", "content"}, ...]`, or `{"input_ids": [...]}`, which the model reads as they are.
A request that cannot be scored gets an error of its own; the requests that were batched with it are served.
"""

import itertools
import json
import os
from types import SimpleNamespace

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

CHOICES = {
    "over_long": ("cut", "refuse"),
    "output": ("raw", "standardized"),
    "device_map": (None, "auto"),
    "dtype": ("float32", "weights"),
    "runtime": ("torch", "onnxruntime"),
}
PASS_TOKENS = {"cpu": 24, "cuda": 1024}
"""What a forward pass costs beside its tokens, in tokens: on a CPU 9 ms at 0.31 ms a token; guessed for a GPU."""
LEAST_LONGEST, BYTES_PER_TOKEN = 1 << 18, 64
"""Bytes of the longest conversation that is read: so many for each of `max_tokens`, and no less than LEAST_LONGEST.
All of a text is tokenized before it is cut, and the requests of its batch wait: 8 MB take most of a minute."""
CANARY = b'[{"role": "user", "content": "canary"}, {"role": "assistant", "content": "canary"}]'


class RefusedConversation(Exception):
    """A conversation that this model cannot score, however often it is sent."""


class TritonPythonModel:
    """The class that Triton's python backend looks for."""

    def initialize(self, args):
        """Load the weights of this version and no code but transformers' own. Threads: OMP_NUM_THREADS."""
        folder = os.path.join(args["model_repository"], args["model_version"])
        weights = os.path.join(folder, "weights")
        self.settings = read_settings(os.path.join(folder, "settings.json"))
        with open(os.path.join(folder, "template.jinja"), encoding="utf-8", newline="") as file:
            self.template = compile_template(file.read())
        self.tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True, trust_remote_code=False)
        if self.settings["runtime"] == "onnxruntime":
            self.model = OnnxModel(folder, args)
            self.vocabulary = self.model.config.get_text_config().vocab_size
        else:
            self.model = load_model(weights, self.settings, args)
            self.vocabulary = self.model.get_input_embeddings().num_embeddings
        self.pad_id = self.model.config.get_text_config().pad_token_id
        self.pass_tokens = PASS_TOKENS[self.model.device.type]
        self.merge_weights = torch.tensor(self.settings["merge_weights"])
        self.warm_up()
        # A metric dies with its family, so the families are kept too.
        self.families, self.counters = counters(
            args,
            reward_tokens_real_total="Tokens of the scored conversations",
            reward_tokens_padded_total="Tokens of their micro-batches, padding included",
            reward_conversations_cut_total="Over-long conversations that lost their start: prompt, then response",
            reward_requests_refused_total="Requests that were refused for what they hold",
        )

    def warm_up(self):
        """Score one conversation, so that the first request is not slow. An error here fails the load."""
        try:
            row, _ = self.encode(CANARY)
            reward = self.forward(*self.pad([row]))[0]
        except RefusedConversation as error:
            raise pb_utils.TritonModelException(f"this version cannot score a plain conversation: {error}") from error
        if not np.isfinite(reward):
            raise pb_utils.TritonModelException(
                f"this version gives a plain conversation the reward {reward}: its weights, or mean and std in "
                "settings.json, are not usable; export it again"
            )

    def execute(self, requests):
        """Score the conversations of all requests together; one response per request, in order."""
        rows, slices, errors = [], [], []
        for request in requests:
            start = len(rows)
            if request.is_cancelled():
                slices.append(slice(start, start))
                errors.append(triton_error("its client has given up", pb_utils.TritonError.CANCELLED))
                continue
            try:
                rows += self.read(request)
                errors.append(None)
            except RefusedConversation as error:
                self.counters["reward_requests_refused_total"].increment(1)
                errors.append(triton_error(error, pb_utils.TritonError.INVALID_ARG))
            # An error that leaves `execute` fails every request of the batch.
            except Exception as error:
                self.counters["reward_requests_refused_total"].increment(1)
                errors.append(triton_error(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL))
            slices.append(slice(start, len(rows)))
        rewards, failures = self.score(rows)
        return [
            pb_utils.InferenceResponse(output_tensors=[], error=error)
            if error is not None
            else respond(rewards[where], rows[where], failures[where])
            for where, error in zip(slices, errors, strict=True)
        ]

    def read(self, request):
        """Token ids of each conversation of one request. Raises RefusedConversation with its index."""
        rows, num_cut = [], 0
        elements = pb_utils.get_input_tensor_by_name(request, "conversation").as_numpy().reshape(-1)
        for index, element in enumerate(elements):
            try:
                ids, was_cut = self.encode(element)
            except RefusedConversation as error:
                raise RefusedConversation(f"conversation {index}: {error}") from error
            rows.append(ids)
            num_cut += was_cut
        # Counted last: of a refused request nothing is scored, so nothing was cut.
        self.counters["reward_conversations_cut_total"].increment(num_cut)
        return rows

    def encode(self, element):
        """Token ids of one conversation, and whether it was cut to fit. Raises RefusedConversation."""
        limit = self.settings["max_tokens"]
        longest = max(LEAST_LONGEST, BYTES_PER_TOKEN * limit)
        if len(element) > longest:
            raise RefusedConversation(f"it has {len(element)} bytes, and this version reads at most {longest}")
        value = parse(element)
        if isinstance(value, dict):
            ids, cut = given_ids(value, self.vocabulary), False
        else:
            text = render(self.template, value)
            ids = encode(self.tokenizer, text, None)
            cut = len(ids) > limit and self.settings["over_long"] == "cut"
            if cut:
                ids = encode(self.tokenizer, text, limit)
        if not ids:
            raise RefusedConversation("it has no tokens")
        if len(ids) > limit:
            raise RefusedConversation(f"it has {len(ids)} tokens, and this version reads at most {limit} (max_tokens)")
        return ids, cut

    def score(self, rows):
        """The reward of each row, NaN where its forward pass failed, and the text of that failure, else "".

        Rows are sorted by length and cut into micro-batches so that little is computed on padding; a row longer than
        `token_budget` is a micro-batch of its own. Where a micro-batch fails, its rows are tried one by one.
        """
        rewards, failures = np.full(len(rows), np.nan, dtype=np.float32), [""] * len(rows)
        left = micro_batches([len(row) for row in rows], self.settings["token_budget"], self.pass_tokens)
        while left:
            indices = left.pop()
            input_ids, mask = self.pad([rows[i] for i in indices])
            try:
                rewards[indices] = self.forward(input_ids, mask)
            # Of many types: memory, a token that the model has no weights for.
            except Exception as error:
                if len(indices) > 1:
                    left += [[i] for i in indices]
                else:
                    failures[indices[0]] = f"{type(error).__name__}: {error}"
                continue
            self.counters["reward_tokens_real_total"].increment(int(mask.sum()))
            self.counters["reward_tokens_padded_total"].increment(input_ids.numel())
        return rewards, failures

    def pad(self, rows):
        """Token ids padded on the right, and their mask. Shape: both (B, T).

        Decoders read their reward at the last token that differs from the config's padding id, and a text may
        well end with that very token (padding is often the ending token). So the padding of a micro-batch is an
        id that none of its rows ends with: the model's own where possible, since some encoders count by it.
        """
        ends = {row[-1] for row in rows}
        own_is_fit = self.pad_id is not None and self.pad_id not in ends
        filler = self.pad_id if own_is_fit else next(i for i in itertools.count() if i not in ends)
        self.model.config.get_text_config().pad_token_id = filler
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = torch.full((len(rows), int(lengths.max())), filler)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
        return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()

    def forward(self, input_ids, mask):
        """Rewards of one micro-batch: the head's outputs times their weights, summed. Shape: returns (B,)."""
        device = self.model.device
        with torch.inference_mode():
            logits = self.model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
        rewards = logits.float().cpu() @ self.merge_weights
        if self.settings["output"] == "standardized":
            rewards = (rewards - self.settings["mean"]) / self.settings["std"]
        return rewards.numpy()


class OnnxModel:
    """The exported graph in ONNX Runtime, called as transformers' model is: tensors in, an object with logits out."""

    def __init__(self, folder, args):
        try:
            import onnxruntime
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"this version needs onnxruntime ({error}): `pip install -r requirements-onnx.txt` beside Triton"
            ) from error
        weights = os.path.join(folder, "weights")
        self.config = AutoConfig.from_pretrained(weights, local_files_only=True, trust_remote_code=False)
        self.device = torch.device("cpu")
        """Where tensors go in; ONNX Runtime copies them to its GPU by itself."""
        options = onnxruntime.SessionOptions()
        # 0 takes all cores, as torch does without the variable.
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))
        providers = ["CPUExecutionProvider"]
        if args["model_instance_kind"] == "GPU":
            if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(args["model_instance_device_id"])}))
            else:
                pb_utils.Logger.log_warn("this onnxruntime has no CUDA: an instance for a GPU computes on the CPU")
        self.session = onnxruntime.InferenceSession(os.path.join(folder, "model.onnx"), options, providers=providers)

    def __call__(self, input_ids, attention_mask):
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        try:
            (logits,) = self.session.run(["logits"], inputs)
        # Its errors have no common base but Exception.
        except Exception as error:
            raise RuntimeError(f"onnxruntime: {error}") from error
        return SimpleNamespace(logits=torch.from_numpy(logits))


def read_settings(path):
    """The settings of this version. Raises TritonModelException for a value that it cannot serve by."""
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    for key, allowed in CHOICES.items():
        if settings[key] not in allowed:
            raise pb_utils.TritonModelException(f"{path}: {key} ({settings[key]!r}) must be one of {allowed}")
    if settings["output"] == "standardized" and (settings["mean"] is None or not (settings["std"] or 0) > 0):
        raise pb_utils.TritonModelException(f"{path}: standardized output needs a mean, and a std above 0")
    return settings


def load_model(weights, settings, args):
    """The model on the CPU, on this instance's GPU, or laid over all GPUs; float32 wherever there is no GPU.

    Raises TritonModelException where config.pbtxt and settings.json disagree about the GPUs, or weights are missing.
    """
    on_gpu, over_all = args["model_instance_kind"] == "GPU", settings["device_map"] == "auto"
    if on_gpu and over_all:
        raise pb_utils.TritonModelException(
            "settings.json lays the model over all GPUs (device_map), and config.pbtxt puts an instance on each: "
            "set its instance_group to [ { kind: KIND_MODEL count: 1 } ]"
        )
    as_stored = settings["dtype"] == "weights" and (on_gpu or (over_all and torch.cuda.is_available()))
    model, report = AutoModelForSequenceClassification.from_pretrained(
        weights,
        dtype="auto" if as_stored else torch.float32,
        device_map=settings["device_map"],
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise pb_utils.TritonModelException(f"{weights} lacks {missing}, so noise would be served: export it again")
    if not over_all:
        model.to(torch.device(f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"))
    return model.eval()


def parse(element):
    """The messages of one conversation, or {"input_ids": [...]}. Raises RefusedConversation."""
    try:
        value = json.loads(element.decode("utf-8") if isinstance(element, bytes) else element)
    except UnicodeDecodeError as error:
        raise RefusedConversation("not UTF-8") from error
    # ValueError: also an integer of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise RefusedConversation(f"not JSON ({error})") from error
    if isinstance(value, dict) and list(value) == ["input_ids"]:
        return value
    if not isinstance(value, list) or not value:
        raise RefusedConversation('must be a non-empty list of {"role", "content"} messages, or {"input_ids": [...]}')
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise RefusedConversation('each message needs a "role" and a "content", both strings')
    return value


def given_ids(value, vocabulary):
    """The token ids that were sent in place of text. Raises RefusedConversation."""
    ids = value["input_ids"]
    # A bool is an int to Python.
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise RefusedConversation("input_ids must be a list of integers")
    outside = [i for i in ids if not 0 <= i < vocabulary]
    if outside:
        raise RefusedConversation(f"input_ids has {outside[0]}, and the vocabulary ends at {vocabulary - 1}")
    return ids


def compile_template(source):
    """The same Jinja settings as `models/reward_model.py`."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def raise_exception(message):
    """Chat templates refuse a conversation by calling `raise_exception`."""
    raise TemplateError(message)


def render(template, messages):
    """The text that the model reads. Raises RefusedConversation."""
    try:
        text = template.render(messages=messages, add_generation_prompt=False)
        # JSON can carry half a surrogate pair, which no tokenizer accepts.
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusedConversation("holds half a surrogate pair, which is not text") from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise RefusedConversation(f"reward.template failed on it ({type(error).__name__}: {error})") from error
    return text


def encode(tokenizer, text, max_tokens):
    """Token ids, special tokens included once; a text over `max_tokens` loses its start, where the prompt begins.

    With None nothing is cut.
    """
    tokenizer.truncation_side = "left"
    opening = tuple(t for t in (tokenizer.bos_token, tokenizer.cls_token) if t)
    if opening and text.startswith(opening):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        fits = max_tokens is None or len(ids) <= max_tokens
        return ids if fits else ids[:1] + ids[len(ids) - max_tokens + 1 :]
    cut = max_tokens is not None
    return tokenizer(text, truncation=cut, max_length=max_tokens, verbose=False)["input_ids"]


def micro_batches(lengths, token_budget, pass_tokens):
    """Indices by rising length, cut where the sum of padded tokens and of the passes' fixed costs is smallest.

    Rows times the longest of a cut stays within the budget, a single row apart. `pass_tokens` is what a forward pass
    costs beside its tokens, in tokens. cost[j] is the least cost of the j shortest rows, start[j] where their last
    cut begins.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cost, start = [0], [0]
    for end, index in enumerate(order, 1):
        longest = lengths[index]
        starts = range(max(0, end - max(1, token_budget // longest)), end)
        begin = min(starts, key=lambda i: cost[i] + (end - i) * longest)
        cost.append(cost[begin] + (end - begin) * longest + pass_tokens)
        start.append(begin)
    batches, end = [], len(order)
    while end:
        batches.append(order[start[end] : end])
        end = start[end]
    return batches[::-1]


def respond(rewards, rows, failures):
    """One request's answer; a reward that is not finite is an error, never a number."""
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
        reason = failures[bad[0]] or "the model's output is not finite"
        return pb_utils.InferenceResponse(
            output_tensors=[], error=triton_error(f"conversation {bad[0]}: {reason}", pb_utils.TritonError.INTERNAL)
        )
    counts = np.array([len(row) for row in rows], dtype=np.int32)
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor("reward", rewards.reshape(-1, 1)),
            pb_utils.Tensor("num_tokens", counts.reshape(-1, 1)),
        ]
    )


def triton_error(error, code):
    """An error for one request. Its text may quote what was sent, and TritonError holds no half surrogate pair."""
    return pb_utils.TritonError(str(error).encode("utf-8", "replace").decode()[:1000], code)


def counters(args, **descriptions):
    """Prometheus counters of this model and version: their families, and the metrics by name."""
    kind = pb_utils.MetricFamily.COUNTER
    families = {
        name: pb_utils.MetricFamily(name=name, description=text, kind=kind) for name, text in descriptions.items()
    }
    labels = {"model": args["model_name"], "version": args["model_version"]}
    return families, {name: family.Metric(labels=labels) for name, family in families.items()}
