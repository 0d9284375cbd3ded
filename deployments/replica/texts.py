"""What a replica must know of its version's texts: the version's files in, tokenizers, grammars and labels out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.plan.types import ModelAppArgs
from cluster.registry.labels import read_labels
from cluster.registry.materialize import materialize
from cluster.registry.store import Registry
from deployments.messages import Detokenize, Tokenize
from deployments.replica.constraints import GrammarChecker
from deployments.replica.intake import tokenizer_of
from deployments.replica.text import TextTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTexts:
    """Tokenizers of the model and of the adapters beside it, and what else its texts need."""

    tokenizer: TextTokenizer
    adapters: Mapping[str, TextTokenizer]
    """By the adapter's name; one may bring a tokenizer or a chat template of its own."""
    grammars: GrammarChecker
    labels: tuple[str, ...]
    """Of a classifier; else empty."""

    def tokenizer_of(self, request: Tokenize | Detokenize) -> TextTokenizer:
        """The one for the request's adapter; raises RequestRefused."""
        return tokenizer_of(request, self.tokenizer, self.adapters)


def load_texts(args: ModelAppArgs) -> ReplicaTexts:
    """Read them from the registry; raises what is wrong there."""
    registry = Registry(args.storage)
    directory = materialize(registry, registry.get(args.registry_name or args.model, args.version))
    tool_format = None if args.tool_parser == "auto" else args.tool_parser
    adapters = {
        adapter.name: TextTokenizer.load(
            materialize(registry, registry.get(adapter.model, adapter.version)), tool_format=tool_format
        )
        for adapter in args.adapters
    }
    return ReplicaTexts(
        tokenizer=TextTokenizer.load(directory, tool_format=tool_format),
        adapters=adapters,
        grammars=GrammarChecker(directory / "tokenizer.json"),
        labels=read_labels(json.loads((directory / "config.json").read_text())) if args.task == "classify" else (),
    )
