"""Triton's side of the reward model: conversations in, one reward and one token count each out.

This file travels into each exported version and imports nothing of the repository, so `render` and `encode`
are copies of those in `models/reward_model.py`; a test holds the two together. Beside it an export puts
`weights/` (safetensors, config.json, tokenizer), `template.jinja` and `settings.json`.

A request that cannot be scored gets an error of its own; the requests that were batched with it are served.
"""

import json
import os

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class RefusedConversation(Exception):
    """A conversation that this model cannot score, however often it is sent."""


class TritonPythonModel:
    """The class that Triton's python backend looks for."""

    def initialize(self, args):
        """Load the weights of this version and no code but transformers' own. Threads: OMP_NUM_THREADS."""
        folder = os.path.join(args["model_repository"], args["model_version"])
        weights = os.path.join(folder, "weights")
        with open(os.path.join(folder, "settings.json"), encoding="utf-8") as file:
            settings = json.load(file)
        self.max_tokens, self.token_budget = settings["max_tokens"], settings["token_budget"]
        with open(os.path.join(folder, "template.jinja"), encoding="utf-8", newline="") as file:
            self.template = compile_template(file.read())
        on_gpu = args["model_instance_kind"] == "GPU"
        self.device = torch.device(f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True, trust_remote_code=False)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            weights, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
        self.model.to(self.device).eval()
        # A metric dies with its family, so the families are kept too.
        self.families, (self.real_tokens, self.padded_tokens) = counters(
            args,
            reward_tokens_real_total="Tokens of the scored conversations",
            reward_tokens_padded_total="Tokens of their micro-batches, padding included",
        )

    def execute(self, requests):
        """Score the conversations of all requests together; one response per request, in order."""
        rows, slices, errors = [], [], []
        for request in requests:
            start = len(rows)
            try:
                rows += self.read(request)
                errors.append(None)
            except RefusedConversation as error:
                errors.append(pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
            slices.append(slice(start, len(rows)))
        rewards, failure = self.score(rows)
        return [
            pb_utils.InferenceResponse(output_tensors=[], error=error)
            if error is not None
            else respond(rewards[where], rows[where], failure)
            for where, error in zip(slices, errors, strict=True)
        ]

    def read(self, request):
        """Token ids of each conversation of one request. Raises RefusedConversation with its index."""
        rows = []
        elements = pb_utils.get_input_tensor_by_name(request, "conversation").as_numpy().reshape(-1)
        for index, element in enumerate(elements):
            try:
                text = render(self.template, parse(element))
                ids = encode(self.tokenizer, text, self.max_tokens)
                if not ids:
                    raise RefusedConversation("its rendered text has no tokens")
                rows.append(ids)
            except RefusedConversation as error:
                raise RefusedConversation(f"conversation {index}: {error}") from error
        return rows

    def score(self, rows):
        """Rewards (NaN where a forward pass failed) and that failure's text.

        Rows are sorted by length and cut into micro-batches of at most `token_budget` padded tokens, so that
        little is computed on padding; a row longer than the budget is a micro-batch of its own.
        """
        rewards, failure = np.full(len(rows), np.nan, dtype=np.float32), ""
        for indices in micro_batches([len(row) for row in rows], self.token_budget):
            try:
                rewards[indices] = self.forward([rows[i] for i in indices])
            except RuntimeError as error:
                failure = f"{type(error).__name__}: {error}"
        return rewards, failure

    def forward(self, rows):
        """Rewards of one micro-batch, padded on the right. Shape: returns (B,)."""
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        input_ids = torch.full((len(rows), longest), int(self.model.config.pad_token_id or 0))
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
        mask = (torch.arange(longest) < lengths[:, None]).long()
        with torch.inference_mode():
            logits = self.model(input_ids=input_ids.to(self.device), attention_mask=mask.to(self.device)).logits
        self.real_tokens.increment(int(lengths.sum()))
        self.padded_tokens.increment(input_ids.numel())
        return logits.squeeze(-1).float().cpu().numpy()


def parse(element):
    """The messages of one conversation. Raises RefusedConversation."""
    try:
        messages = json.loads(element.decode("utf-8") if isinstance(element, bytes) else element)
    except UnicodeDecodeError as error:
        raise RefusedConversation("not UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise RefusedConversation(f"not JSON ({error})") from error
    if not isinstance(messages, list) or not messages:
        raise RefusedConversation('must be a non-empty list of {"role", "content"} messages')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise RefusedConversation('each message needs a "role" and a "content", both strings')
    return messages


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
    """Token ids, special tokens included once; an over-long text loses its start, where the prompt begins."""
    tokenizer.truncation_side = "left"
    opening = tuple(t for t in (tokenizer.bos_token, tokenizer.cls_token) if t)
    if opening and text.startswith(opening):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids if len(ids) <= max_tokens else ids[:1] + ids[len(ids) - max_tokens + 1 :]
    return tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]


def micro_batches(lengths, token_budget):
    """Indices by rising length, cut so that rows times the longest stays within the budget."""
    batch = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Sorted, so the newcomer is the longest.
        if batch and (len(batch) + 1) * lengths[index] > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def respond(rewards, rows, failure):
    """One request's answer; a reward that is not finite is an error, never a number."""
    bad = np.flatnonzero(~np.isfinite(rewards))
    if bad.size:
        reason = failure or "the model's output is not finite"
        return pb_utils.InferenceResponse(
            output_tensors=[], error=pb_utils.TritonError(f"conversation {bad[0]}: {reason}")
        )
    counts = np.array([len(row) for row in rows], dtype=np.int32)
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor("reward", rewards.reshape(-1, 1)),
            pb_utils.Tensor("num_tokens", counts.reshape(-1, 1)),
        ]
    )


def counters(args, **descriptions):
    """Prometheus counters of this model and version: their families, and the metrics themselves."""
    kind = pb_utils.MetricFamily.COUNTER
    families = [pb_utils.MetricFamily(name=name, description=text, kind=kind) for name, text in descriptions.items()]
    labels = {"model": args["model_name"], "version": args["model_version"]}
    return families, [family.Metric(labels=labels) for family in families]
