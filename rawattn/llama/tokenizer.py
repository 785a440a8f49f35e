"""Text to tokens and back, by the package tokenizers from what the model's file says."""

from __future__ import annotations

import datetime
import json
from typing import Any

from .weights import Gguf, Safetensors

# The first cut of a text, before pairs are merged, by the names that GGUF files give it.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types of GGUF


class Tokenizer:
    """encode() and decode(); end, the tokens that end an answer; chat(), which wraps a question as the model was taught to expect it."""

    def __init__(self, checkpoint: Gguf | Safetensors):
        self._tokenizer, self.end, self._template, self._names = (
            _from_gguf(checkpoint) if isinstance(checkpoint, Gguf) else _from_folder(checkpoint)
        )

    def encode(self, text: str) -> list[int]:
        """With the token that begins a text, where the model has one."""
        return self._tokenizer.encode(text).ids

    def chat(self, question: str) -> list[int]:
        """The tokens of a conversation that the model is to answer; the bare question for a model without a chat template."""
        if not self._template:
            return self.encode(question)
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # the template is the model file's, not ours

        def refuse(message: str) -> None:
            raise ValueError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.date.today().strftime(form)}
        messages = [{"role": "user", "content": question}]
        text = environment.from_string(self._template).render(messages=messages, add_generation_prompt=True, **self._names)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def stream(self) -> Any:
        """A function from each next token to the text that it completes, which is empty inside a character of several tokens."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""


def _from_gguf(checkpoint: Gguf) -> tuple[Any, set[int], str | None, dict[str, str]]:
    from tokenizers import AddedToken, processors

    def get(name: str, default: Any = None) -> Any:
        return checkpoint.metadata.get(f"tokenizer.ggml.{name}", default)

    tokens: list[str] = get("tokens")
    kind = get("model")
    if kind == "gpt2":
        tokenizer = _byte_level(tokens, get("merges"), get("pre", "gpt-2"))
    elif kind == "llama":
        tokenizer = _sentence_piece(tokens, get("scores"), get("token_type"), get("add_space_prefix", True))
    else:
        raise ValueError(f"{checkpoint.path} has a tokenizer of the kind {kind}; needed: gpt2 or llama")
    special = [token for token, of in zip(tokens, get("token_type"), strict=True) if of in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    names = {name: tokens[get(f"{name[:3]}_token_id")] for name in ("bos_token", "eos_token") if get(f"{name[:3]}_token_id") is not None}
    if get("add_bos_token", kind == "llama"):
        first = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(f"{first} $A", None, [(first, tokens.index(first))])
    end = {get(name) for name in ("eos_token_id", "eot_token_id")} - {None}
    return tokenizer, end, checkpoint.metadata.get("tokenizer.chat_template"), names


def _byte_level(tokens: list[str], merges: list[str], pre: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"the tokenizer cuts texts like {pre}; needed: {', '.join(PRE_TOKENIZERS)}")
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(tokens: list[str], scores: list[float], types: list[int], space_first: bool) -> Any:
    """SentencePiece's BPE keeps no merges: any two tokens that make a third are one, and the third's score is its rank."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {token: i for i, token in enumerate(tokens)}
    pairs = [
        (-scores[i], -cut, token[:cut], token[cut:])
        for i, token in enumerate(tokens)
        if types[i] == NORMAL
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    merges: list[Any] = [(left, right) for _, _, left, right in sorted(pairs)]
    tokenizer = Tokenizer(models.BPE(ids, merges, byte_fallback=True, fuse_unk=True))
    prefix: list[Any] = [normalizers.Prepend("▁")] if space_first else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip: list[Any] = [decoders.Strip(" ", left=1)] if space_first else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def _from_folder(checkpoint: Safetensors) -> tuple[Any, set[int], str | None, dict[str, str]]:
    from tokenizers import Tokenizer

    def settings(name: str) -> dict[str, Any]:
        file = checkpoint.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    about = settings("tokenizer_config.json")
    end = settings("generation_config.json").get("eos_token_id") or settings("config.json").get("eos_token_id") or []
    template_file = checkpoint.path / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else about.get("chat_template")
    names = {name: about[name] for name in ("bos_token", "eos_token") if about.get(name)}
    names = {name: token if isinstance(token, str) else token["content"] for name, token in names.items()}
    return tokenizer, set(end if isinstance(end, list) else [end]), template, names
