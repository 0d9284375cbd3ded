"""Mistakes that people make in the YAML: each is found where it is, and says what is wrong and what to do."""

import pytest

from cluster.config.load import load_text
from tests.support.mistakes import Mistake, check_explained, check_plain_words, problems_of

GOOD = """\
name: quickstart
storage: ~/.manta
cluster:
  provider: {kind: local}
  nodes:
    - {name: box, resources: {CPU: 2, memory: 8GiB}}
gateway:
  http: {host: 127.0.0.1, port: 8000}
models:
  - name: smollm2
    source: hf://org/repo@main
    context_tokens: 2048
    dtype: bfloat16
"""
MODEL_END = "    dtype: bfloat16\n"
SOURCE = "source: hf://org/repo@main"
NODE = "{name: box, resources: {CPU: 2, memory: 8GiB}}"
TAIL = "    dtype: bfloat16"


def m(old: str, new: str, path: str, says: str, remedy: str) -> Mistake:
    return Mistake(old=old, new=new, path=path, says=says, remedy=remedy)


def in_model(new: str, path: str, says: str, remedy: str) -> Mistake:
    """A mistake in lines that are added to the model."""
    lines = "\n".join(f"    {line}" for line in new.splitlines())
    return m(TAIL, f"{TAIL}\n{lines}", f"models[0].{path}", says, remedy)


TWO_NODES = (
    "cluster: {provider: {kind: existing, dashboard: 'http://h:8265'}, nodes: [&n {name: a, resources: {CPU: 2}}"
)

MISTAKES = {
    # the text itself
    "tab indentation": m("  provider", "\tprovider #!", "(whole file)", "a tab", "spaces"),
    "key twice": m("name: quick", "name: a\nname: #!\n  quick", "name", "twice, first in line 1", "remove one"),
    "two documents": m("gateway:", "---  #!\ngateway:", "(whole file)", "second document", "---"),
    "unclosed brace": m(
        "{kind: local}", "{kind: local\n  nodes: #!", "(whole file)", "{ is not closed", "{key: value"
    ),
    "two colons": m("name: quickstart", "name: quick: start #!", "(whole file)", "second `: `", "quote"),
    "bad indentation": m("    dtype:", "   dtype: #!", "(whole file)", "indentation", "align"),
    "no closing quote": m("name: quickstart", 'name: "quick', "(whole file)", "quote is not closed", "close"),
    "unknown alias": m("{kind: local}", "*local #!", "(whole file)", "no anchor", "define the anchor"),
    "yes for true": in_model(
        "kv_cache: {prefix_caching: yes} #!",
        "kv_cache.prefix_caching",
        "`yes` is true or false",
        "write true or false",
    ),
    "on as a name": m("- name: smollm2", "- name: on #!", "models[0].name", "`on` is true or false", "quotes"),
    "octal number": m("port: 8000}", "port: 08000} #!", "gateway.http.port", "begins with 0", "without the lead"),
    "octal looking": m(
        "port: 8000}", "port: 0777} #!", "gateway.http.port", "begins with 0", "without the leading 0"
    ),
    "base 60": in_model("timeouts: {step: 1:30} #!", "timeouts.step", "base 60", "90s"),
    "number as key": m(
        "{CPU: 2,", "{CPU: 2, 7: 1, #!\n     ", "cluster.nodes[0].resources", "'7', which is not", "quotes"
    ),
    "python tag": m(
        "name: quickstart", "name: !!python/name:os.system x #!", "name", "has the tag", "remove the tag"
    ),
    "contains itself": m(
        "{CPU: 2,", "&r {CPU: 2, x: *r, #!\n     ", "cluster.nodes[0].resources.x", "itself", "alias"
    ),
    # keys
    "unknown top key": m("gateway:", "gatway: #!", "gatway", "not a known key", "did you mean gateway?"),
    "unknown model key": in_model("contxt_tokens: 4 #!", "contxt_tokens", "not a known key", "mean context_tokens?"),
    "unknown, no guess": in_model("zzz: 4 #!", "zzz", "not a known key", "known keys"),
    "CPU in lower case": m(
        "{CPU: 2", "{cpu: 2 #!\n     ", "cluster.nodes[0].resources.cpu", "not a known", "mean CPU?"
    ),
    "RAM for memory": m("memory: 8GiB", "ram: 8", "cluster.nodes[0].resources.ram", "known", "mean memory?"),
    "missing name": m("name: quickstart\n", "", "name", "is missing", "add `name: ...`"),
    "missing source": m("- name: smollm2\n    " + SOURCE, "- name: smollm2 #!", "models[0].source", "missing", "add"),
    "missing CPU": m("{CPU: 2, m", "{m", "cluster.nodes[0].resources.CPU", "is missing", "add `CPU: ...`"),
    "empty section": m("gateway:\n  http", "gateway: #!\nx", "gateway", "has no value", "remove the line"),
    # kinds of value
    "section as text": m("http: {host: 127.0.0.1, port: 8000}", "http: 8000 #!", "gateway.http", "a mapping", "host"),
    "list as mapping": m(
        "nodes:\n    - ", "nodes: #!\n      ", "cluster.nodes", "must be a list", "begin each entry with `- `"
    ),
    "no models": m("models:\n", "models: [] #!\nx:\n", "models", "has no entries", "begin each entry"),
    "models as a mapping": m("models:\n", "models: {} #!\nx:\n", "models", "must be a list", "begin each entry"),
    "text for number": m(
        "tokens: 2048", "tokens: many #!", "models[0].context_tokens", "not a whole number", "from 1"
    ),
    "quoted number": m(
        "tokens: 2048", 'tokens: "2048" #!', "models[0].context_tokens", "whole", "2048 without quotes"
    ),
    "fraction": m(
        "tokens: 2048", "tokens: 20.5 #!", "models[0].context_tokens", "not a whole number", "whole number"
    ),
    "whole fraction": m(
        "tokens: 2048", "tokens: 2048.0 #!", "models[0].context_tokens", "whole number", "write 2048"
    ),
    "number for text": m("name: smollm2", "name: 7 #!", "models[0].name", "not a name", "write a short name"),
    "null": m("dtype: bfloat16", "dtype: #!", "models[0].dtype", "has no value", "take the default"),
    "infinite": m("CPU: 2", "CPU: .inf", "cluster.nodes[0].resources.CPU", "finite", "a number from 0"),
    "text in a list": in_model(
        "pipeline: {stages: 2, split: [19, x]} #!", "pipeline.split[1]", "whole", "at least 1"
    ),
    "split is a number": in_model(
        "pipeline: {stages: 1, split: 30} #!", "pipeline.split", "not a list", "in brackets"
    ),
    # ranges and choices
    "zero stages": in_model("pipeline: {stages: 0} #!", "pipeline.stages", "must be at least 1", "from 1 to 64"),
    "stages in words": in_model("pipeline: {stages: two} #!", "pipeline.stages", "choices", "auto or a whole number"),
    "port too large": m("port: 8000", "port: 80000 #!\n   ", "gateway.http.port", "at most 65535", "1 to 65535"),
    "negative cores": m("CPU: 2", "CPU: -2", "cluster.nodes[0].resources.CPU", "at least 0", "from 0"),
    "wrong dtype": m("bfloat16", "bf16 #!", "models[0].dtype", "not one of the choices", "did you mean bfloat16?"),
    "wrong task": in_model("task: chat #!", "task", "not one of the choices", "generate, embed or classify"),
    "wrong kind": m("kind: local", "kind: locl", "cluster.provider.kind", "not a known kind", "did you mean local?"),
    "kind not written": m("{kind: local}", "local #!", "cluster.provider", "must say its kind", "`kind: local`"),
    "kind of the wrong type": m(
        "kind: local", "kind: [1]", "cluster.provider.kind", "known kind", "local or existing"
    ),
    "name with capitals": m("name: smollm2", "name: Smol_LM2 #!", "models[0].name", "characters", "write smol-lm2"),
    "name too long": m("name: smollm2", f"name: {'a' * 41} #!", "models[0].name", "41 characters", "shorter"),
    # units
    "size without unit": m("8GiB", "8", "cluster.nodes[0].resources.memory", "size with a unit", "its unit"),
    "size in wrong unit": m("8GiB", "8 gigs", "cluster.nodes[0].resources.memory", "size with a unit", "GiB"),
    "size too small": m(
        "kind: local", "kind: local, object_store: 1MiB", "cluster.provider.object_store", "small", "75"
    ),
    "time without unit": in_model("timeouts: {step: 60} #!", "timeouts.step", "time with a unit", "ms, s, m"),
    "no time at all": in_model("timeouts: {step: 0s} #!", "timeouts.step", "no time at all", "such as 60s"),
    # sources
    "no scheme": m(SOURCE, "source: org/repo #!", "models[0].source", "has no scheme", "begin with one of"),
    "path without scheme": m(SOURCE, "source: /models/x #!", "models[0].source", "no scheme", "path:///models/x"),
    "unknown scheme": m(
        SOURCE, "source: s3://b/x #!", "models[0].source", "s3:// is not a scheme", "one of the schemes"
    ),
    "wheel, no version": m(SOURCE, "source: wheel://p/x #!", "models[0].source", "no exact version", "p==VERSION"),
    "wheel, wildcard": m(SOURCE, "source: wheel://p==0.1.*/x #!", "models[0].source", "'0.1.*' is not an", "0.1.2"),
    "wheel, no path": m(SOURCE, "source: wheel://p==0.1 #!", "models[0].source", "no path inside", "unzip -l"),
    "wheel, upward path": m(SOURCE, "source: wheel://p==1/../x #!", "models[0].source", "..", "plainly"),
    "hf, no organisation": m(
        SOURCE, "source: hf://gpt2 #!", "models[0].source", "'gpt2' is not an org", "hf://Qwen/"
    ),
    "hf, empty revision": m(
        SOURCE, "source: hf://a/b@ #!", "models[0].source", "'' is not a revision", "after the @"
    ),
    "path, relative": m(SOURCE, "source: path://models/x #!", "models[0].source", "not an absolute", "three slashes"),
    "registry, no alias": m(
        SOURCE, "source: registry://smollm2 #!", "models[0].source", "no alias", "smollm2@latest"
    ),
    "registry, bad alias": m(SOURCE, "source: registry://m@1 #!", "models[0].source", "neither an alias", "@v1"),
    "source with a space": m(SOURCE, "source: 'hf://a /b' #!", "models[0].source", "a space", "without spaces"),
    "digest too short": in_model("sha256: abc #!", "sha256", "not a SHA-256", "sha256sum"),
    "digest of a repository": in_model(
        f"sha256: {'a' * 64} #!", "sha256", "not one file", "pin the source by a commit"
    ),
    # places and addresses
    "relative storage": m("~/.manta", "data/manta #!", "storage", "is a relative path", "~/path or s3://"),
    "storage in memory": m("~/.manta", "memory://x #!", "storage", "private to one process", "s3://bucket"),
    "incomplete URI": m("~/.manta", "s3:// #!", "storage", "not a complete URI", "s3://bucket"),
    "host with scheme": m("host: 127.0.0.1", "host: 'http://x'", "gateway.http.host", "not a host", "127.0.0.1"),
    "dashboard, no scheme": m(
        "{kind: local}",
        "{kind: existing, dashboard: '1.2.3.4:8265'} #!",
        "cluster.provider.dashboard",
        "address",
        "http://",
    ),
    "relative temp_dir": m(
        "kind: local", "kind: local, temp_dir: tmp", "cluster.provider.temp_dir", "absolute", "/tmp/"
    ),
    "long temp_dir": m(
        "kind: local",
        f"kind: local, temp_dir: /tmp/{'d' * 60}",
        "cluster.provider.temp_dir",
        "too long",
        "/tmp/manta",
    ),
    "name makes temp_dir long": m(
        "name: quickstart", f"name: {'q' * 40} #!", "name", "too long", "provider.temp_dir"
    ),
    "code archive": m(
        "gateway:", "  code: {kind: uri, uri: manta} #!\ngateway:", "cluster.code.uri", "archive", ".zip"
    ),
    # relations
    "same port twice": m(
        "kind: local", "kind: local, ray_port: 8265", "cluster.provider.dashboard_port", "ray_port", ""
    ),
    "gateway port taken": m(
        "port: 8000}", "port: 6379} #!", "gateway.http.port", "provider.ray_port", "another port"
    ),
    "model name twice": m(
        MODEL_END, MODEL_END + "  - name: smollm2 #!\n    source: hf://a/b\n", "models[1].name", "models[0]", "rename"
    ),
    "node name twice": m(
        GOOD[GOOD.index("cluster:") : GOOD.index("gateway:")],
        TWO_NODES + ", *n]} #!\n",
        "cluster.nodes[1].name",
        "nodes[0]",
        "rename",
    ),
    "node min over max": m(
        NODE, "{name: box, resources: {CPU: 2}, min: 2} #!", "cluster.nodes[0].min", "more than max", "max to 2"
    ),
    "local is one machine": m(
        NODE, "{name: box, resources: {CPU: 2}, max: 2} #!", "cluster.nodes[0].max", "more machines", "kind: existing"
    ),
    "local with two groups": m(
        NODE, f"{NODE}\n    - {{name: b, resources: {{CPU: 1}}}} #!", "cluster.nodes[1]", "second group", "existing"
    ),
    "object store over memory": m(
        "kind: local",
        "kind: local, object_store: 9GiB",
        "cluster.provider.object_store",
        "memory of the node",
        "200MiB",
    ),
    "gateway over node": m("gateway:", "gateway:\n  cpus: 3 #!", "gateway.cpus", "cores of any node", "2 or less"),
    "split length": in_model(
        "pipeline: {stages: 3, split: [19, 11]} #!", "pipeline.split", "2 entries for 3", "to 2"
    ),
    "split without stages": in_model(
        "pipeline: {split: [19, 11]} #!", "pipeline.split", "fixed number", "`stages: 2`"
    ),
    "cache under context": in_model(
        "kv_cache: {tokens: 1024} #!", "kv_cache.tokens", "one full context", "or to auto"
    ),
    "cache in part blocks": in_model(
        "kv_cache: {tokens: 2050} #!", "kv_cache.tokens", "whole number of b", "write 2064"
    ),
    "replicas min over max": in_model("replicas: {min: 3, max: 2} #!", "replicas.min", "more than max", "max to 3"),
    "embed in stages": in_model(
        "task: embed\npipeline: {stages: 2} #!",
        "pipeline.stages",
        "more than a model with task embed",
        "set stages to 1",
    ),
    "classifier in stages": in_model(
        "task: classify\npipeline: {stages: 2} #!", "pipeline.stages", "with task classify", "set stages to 1"
    ),
    "step under running": in_model(
        "batching: {max_running: 64, max_step_tokens: 32} #!", "batching.max_step_tokens", "running request", "lower"
    ),
    "step over request": in_model(
        "timeouts: {request: 5s, step: 1m} #!", "timeouts.step", "whole request", "5s or less"
    ),
    "wrong quantization": in_model(
        "quantization: int5 #!", "quantization", "not one of the choices", "write int8 or int4"
    ),
    "wrong kernels": in_model("kernels: nativ #!", "kernels", "not one of the choices", "did you mean native?"),
    "embed quantized": in_model(
        "task: embed\nquantization: int8 #!", "quantization", "with task embed", "remove quantization"
    ),
    "quantized on a GPU": in_model(
        "quantization: int4 #!\ndevice: cuda\nresources: {stage_gpus: 1}", "quantization", "GPU", "device to cpu"
    ),
    "quantized in float32": m(
        TAIL, "    dtype: float32\n    quantization: int8 #!", "models[0].quantization", "float32", "to bfloat16"
    ),
    "native in float32": m(
        TAIL, "    dtype: float32\n    kernels: native #!", "models[0].kernels", "dtype float32", "dtype to bfloat16"
    ),
    "adapter of an embedding model": in_model(
        "task: embed\nadapters: #!\n  - {name: tuned, source: 'registry://tuned@latest'}",
        "adapters",
        "cannot be had with task embed",
        "set task to generate",
    ),
    "adapter from elsewhere": in_model(
        "adapters:\n  - {name: tuned, source: 'hf://org/tuned'} #!",
        "adapters[0].source",
        "hf://, which cannot hold an adapter",
        "publish: adapter",
    ),
    "adapter named like a model": in_model(
        "adapters:\n  - {name: smollm2, source: 'registry://tuned@latest'} #!",
        "adapters[0].name",
        "the name of another model, models[0]",
        "rename one",
    ),
    "native embedding": in_model("task: embed\nkernels: native #!", "kernels", "task embed", "set kernels to auto"),
    "vLLM without its Python": in_model("engine: {kind: vllm} #!", "engine.python", "missing", "Python 3.11"),
    "vLLM by a relative path": in_model(
        "engine: {kind: vllm, python: venv/bin/python} #!", "engine.python", "absolute path", "/opt/vllm/bin/python"
    ),
    "vLLM in stages": in_model(
        "pipeline: {stages: 2}\nengine: {kind: vllm, python: /opt/vllm/bin/python} #!",
        "engine.kind",
        "pipeline.stages 2",
        "set pipeline.stages to 1",
    ),
    "vLLM quantized": in_model(
        "quantization: int8\nengine: {kind: vllm, python: /opt/vllm/bin/python} #!",
        "engine.kind",
        "quantization int8",
        "remove quantization",
    ),
    "vLLM with guesses": in_model(
        "batching: {speculative_tokens: 4}\nengine: {kind: vllm, python: /opt/vllm/bin/python} #!",
        "engine.kind",
        "batching.speculative_tokens 4",
        "remove batching.speculative_tokens",
    ),
    "vLLM with steps ahead": in_model(
        "batching: {steps_ahead: 1}\nengine: {kind: vllm, python: /opt/vllm/bin/python} #!",
        "engine.kind",
        "batching.steps_ahead 1",
        "remove batching.steps_ahead",
    ),
    "too many steps ahead": in_model(
        "batching: {steps_ahead: 2} #!", "batching.steps_ahead", "not one of the choices", "0 or 1"
    ),
    "too many guesses": in_model("batching: {speculative_tokens: 65} #!", "batching.speculative_tokens", "64", "64"),
    "vLLM for vectors": in_model(
        "task: embed\nengine: {kind: vllm, python: /opt/vllm/bin/python} #!", "engine.kind", "task embed", "generate"
    ),
    "engine by its name alone": in_model("engine: vllm #!", "engine", "must say its kind", "kind: manta"),
    "cuda without GPU node": in_model(
        "device: cuda #!\nresources: {stage_gpus: 1}", "device", "no node has one", "`GPU: 1`"
    ),
    "GPU without cuda": in_model("resources: {stage_gpus: 1} #!", "resources.stage_gpus", "nothing uses", "to cuda"),
    "uneven share of a GPU": in_model(
        "device: cuda\nresources: {stage_gpus: 0.4} #!",
        "resources.stage_gpus",
        "divide a GPU",
        "write 0.5 (2 on a GPU)",
    ),
    "stage over node": in_model(
        "resources: {stage_cpus: 4} #!", "resources.stage_cpus", "cores of any node", "threads"
    ),
    "stages over all nodes": in_model(
        "pipeline: {stages: 3}\nresources: {stage_cpus: 1} #!",
        "resources.stage_cpus",
        "3.05 cores in all",
        "add nodes",
    ),
    "half a core": m("CPU: 2", "CPU: 1.5", "cluster.nodes[0].resources.CPU", "not a whole number", "write 1"),
    "half a GPU": m("CPU: 2", "CPU: 2, GPU: 0.5", "cluster.nodes[0].resources.GPU", "not a whole number", "write 1"),
    "stage of nothing": in_model(
        "resources: {stage_cpus: 0, reserve_memory: false} #!", "resources.stage_cpus", "reserves nothing", "0.01"
    ),
    "spread over one node": in_model(
        "pipeline: {stages: 2, placement: STRICT_SPREAD} #!", "pipeline.placement", "node of its own", "SPREAD"
    ),
}


def test_the_text_the_mistakes_are_made_in_is_right() -> None:
    assert load_text(GOOD, "manta.yaml").name == "quickstart"


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_explained_where_it_is(mistake: Mistake) -> None:
    check_explained(mistake, GOOD)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_no_message_speaks_the_language_of_the_validator(mistake: Mistake) -> None:
    check_plain_words(mistake, GOOD)


def test_a_mistake_breaks_no_rule_that_does_not_need_it() -> None:
    """A wrong context_tokens is not replaced by its default, with which the cache would be too small."""
    text = GOOD.replace("tokens: 2048", "tokens: lots") + "    kv_cache: {tokens: 16}\n"
    assert [problem.path for problem in problems_of(text)] == ["models[0].context_tokens"]


def test_a_value_refused_by_the_reader_is_reported_once() -> None:
    assert len(problems_of(GOOD.replace("name: smollm2", "name: on"))) == 1


def test_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert any("too many entries" in problem.message for problem in problems_of("\n".join(lines)))


def test_deep_nesting_is_refused() -> None:
    problem = problems_of("a: " + "[" * 5000)[0]
    assert "nested too deeply" in problem.message
    assert problem.line == 1
