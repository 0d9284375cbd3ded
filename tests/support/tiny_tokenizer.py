"""Small tokenizers built on the spot: byte-level BPE, sentencepiece with byte fallback, and WordPiece."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deployments.replica.text import TextTokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.index0 == 0 and message['role'] == 'assistant' %}"
    "{{ raise_exception('the first message must not be from the assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

HERMES_TEMPLATE = (
    "{% if tools %}{{ '<|system|>Tools:' }}"
    "{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
    "{{ '\nAnswer with <tool_call>{name, arguments}</tool_call>.\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function.name + (call.function.arguments | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A template that shows tools and calls, as those of Qwen and Hermes do."""

EOS_ID = 0
"""End of text in every tokenizer of this module."""

_MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld"]


def byte_level_tokenizer(
    *, chat_template: str | None = CHAT_TEMPLATE, added: Sequence[str] = (), special: bool = False
) -> PreTrainedTokenizerFast:
    """Every byte is a token (ids 2..257), a few merges, ``<|end|>`` is 0 and ``<|tag 世|>`` an added plain token.

    ``added`` are more added tokens, ``special`` or plain.
    """
    vocab = {"<|end|>": EOS_ID, "<|pad|>": 1}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    for merge in _MERGES:
        vocab[merge.replace(" ", "")] = len(vocab)
    merges = [tuple(merge.split()) for merge in _MERGES]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>", "<|pad|>"])
    backend.add_tokens([AddedToken("<|tag \u4e16|>", special=False, normalized=False)])
    backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", chat_template=chat_template
    )


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's arrangement: words begin with U+2581, unknown characters fall back to ``<0xNN>`` tokens."""
    vocab = {"</s>": EOS_ID, "<s>": 1, "<unk>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for token in ("\u2581", "\u2581hello", "\u2581world", "a", "b", "\u00e9", "\u2581\u4e16"):
        vocab[token] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>", "<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's arrangement: ``##`` continues a word."""
    words = ["[SEP]", "[CLS]", "[UNK]", "[PAD]", "hello", "world", "##s", "##ly", "caf\u00e9", ",", "."]
    backend = Tokenizer(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    backend.add_special_tokens(["[SEP]", "[CLS]", "[PAD]"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")


def tiny_text() -> TextTokenizer:
    """The byte-level tokenizer, ready for an engine."""
    return TextTokenizer(byte_level_tokenizer(), (EOS_ID,))
