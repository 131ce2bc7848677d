"""Loading models: files and Hugging Face references give a builder and example inputs, or one line of why not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tpcompiler.errors import ModelError, TpcError
from tpcompiler.load.model import as_call, load_model, parse_settings
from tpcompiler.spec.schema import Spec

ROOT = Path(__file__).parents[2]
SPEC = Spec.load({"mesh": {"tensor": 2}})

GOOD = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.f = nn.Linear(n, n)
    def forward(self, x):
        return self.f(x)

class Net(nn.Module):
    def __init__(self, n=4, layers=1):
        super().__init__()
        self.layers = nn.ModuleList(Layer(n) for _ in range(layers))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

def small(layers=3):
        return Net(2, layers)

def example_inputs(batch=2, n=4):
    return {"x": torch.randn(batch, n)}
"""


LATE = """
import sizes
import torch

class Net(torch.nn.Linear):
    def __init__(self):
        import sizes as again
        assert again is sizes
        super().__init__(again.WIDTH, again.WIDTH)

def example_inputs():
    from sizes import WIDTH
    return torch.ones(2, WIDTH)
"""


def write(tmp_path: Path, text: str, name: str = "model.py") -> str:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(file)


def refused(ref: str, spec: Any = SPEC, **overrides: Any) -> str:
    """The one line that loading, building, or making inputs gives."""

    def everything() -> None:
        loaded = load_model(ref, Spec.load(spec), overrides)
        loaded.inputs()
        loaded.build()

    with pytest.raises(TpcError) as caught:
        everything()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["bert", "encoder", "gpt2", "llama", "seq2seq"])
def test_models_of_the_repository_run_on_their_inputs(name: str) -> None:
    loaded = load_model(str(ROOT / "models" / f"{name}.py"), SPEC, {"layers": 1})
    args, kwargs = loaded.inputs()
    output = loaded.build()(*args, **kwargs)
    assert all(t.isfinite().all() for t in torch.utils._pytree.tree_leaves(output))


def test_the_model_is_the_class_that_no_other_uses(tmp_path: Path) -> None:
    loaded = load_model(write(tmp_path, GOOD), SPEC)
    assert loaded.name == "Net"
    assert type(loaded.build()).__name__ == "Net"


def test_the_attribute_model_comes_first_and_a_name_before_all(tmp_path: Path) -> None:
    ref = write(tmp_path, GOOD + "\nModel = Layer")
    assert load_model(ref, SPEC, {"n": 4}).name == "Layer"
    assert load_model(f"{ref}:Net", SPEC).name == "Net"
    assert len(list(load_model(f"{ref}:small", SPEC).build().parameters())) == 6


def test_arguments_come_from_the_spec_and_settings_win(tmp_path: Path) -> None:
    spec = Spec.load({"mesh": {"tensor": 2}, "model": {"n": 6, "layers": 2}, "inputs": {"batch": 3}})
    loaded = load_model(write(tmp_path, GOOD), spec, {"layers": 5})
    assert [p.shape for p in loaded.build().parameters()] == [(6, 6), (6,)] * 5
    assert loaded.inputs()[1]["x"].shape == (3, 6)  # n is the model's, batch the inputs'
    assert loaded.inputs(batch=7)[1]["x"].shape == (7, 6)


def test_building_follows_the_device_of_the_caller(tmp_path: Path) -> None:
    loaded = load_model(write(tmp_path, GOOD), SPEC)
    with torch.device("meta"):
        assert all(p.is_meta for p in loaded.build().parameters())


def test_example_inputs_are_the_same_each_time_and_leave_the_generator_alone(tmp_path: Path) -> None:
    loaded = load_model(write(tmp_path, GOOD), SPEC)
    before = torch.get_rng_state()
    first, second = loaded.inputs()[1]["x"], loaded.inputs()[1]["x"]
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_siblings_are_imported_and_nothing_stays_behind(tmp_path: Path) -> None:
    """Two directories with a sibling of one name each get their own, also from an import inside a constructor."""
    for n in (3, 5):
        write(tmp_path / str(n), f"WIDTH = {n}", "sizes.py")
        write(tmp_path / str(n), LATE)
    modules, path = dict(sys.modules), list(sys.path)
    both = {n: load_model(str(tmp_path / str(n) / "model.py"), SPEC) for n in (3, 5)}
    for n, loaded in both.items():
        assert loaded.inputs()[0][0].shape == (2, n)
        assert next(loaded.build().parameters()).shape == (n, n)
    assert sys.modules == modules
    assert sys.path == path
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_file_in_a_package_imports_relatively(tmp_path: Path) -> None:
    write(tmp_path, "", "nested_net/__init__.py")
    write(tmp_path, "", "nested_net/deep/__init__.py")
    write(tmp_path, "N = 6", "nested_net/sizes.py")
    ref = write(
        tmp_path,
        GOOD + "\nfrom ..sizes import N\nclass Model(Net):\n  def __init__(self): super().__init__(N)",
        "nested_net/deep/net.py",
    )
    loaded = load_model(ref, SPEC)
    with loaded.environment:
        assert sys.modules[type(loaded.build()).__module__].N == 6
    assert not [m for m in sys.modules if m.startswith("nested_net")]


@pytest.mark.parametrize("name", ["random.py", "my-model.py", "torch.py"])
def test_a_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    assert load_model(write(tmp_path, GOOD, name), SPEC).name == "Net"
    assert sys.modules["torch"] is torch


INPUTS = "\ndef example_inputs(): return {'x': torch.ones(2, 4)}"
NET = GOOD.replace("def example_inputs", "def other")
REFUSED = [  # the file, what is appended to its name, words in order
    ("import nowhere_to_be_found", "", "model.py:1: cannot be imported: ModuleNotFoundError: No module named 'nowhere"),
    ("x = 1\ny = (", "", "model.py:2: not Python: '(' was never closed"),
    ("x = 1\n\nraise ValueError('no\\nway')", "", "model.py:3: cannot be imported: ValueError: no way"),
    ("import sys\nsys.exit(3)", "", "model.py:2: cannot be imported: it ends the program"),
    ("x = 1\0", "", "model.py"),
    ("x = 1", "", "defines no torch.nn.Module class"),
    (NET, "", "has no example_inputs"),
    (GOOD, ":Nett", "has no 'Nett'; did you mean 'Net'"),
    (GOOD, ":torch", "is a module, neither a class nor a function"),
    (GOOD + "\nclass Thing: pass", ":Thing", "not a torch.nn.Module"),
    (GOOD + "\nclass Other(nn.Module): pass", "", "several classes could be the model; say which: "),
    (GOOD + "\ndef build(): return 3", ":build", "gives a int, not a torch.nn.Module"),
    (GOOD + "\ndef build(n): return Net(n)", ":build", "needs an argument 'n'"),
    (GOOD + "\nbuilt = Net()", ":built", None),
    (GOOD.replace("self.f = nn.Linear(n, n)", "self.f = nn.Linear(n)"), "", "model.py:8: Net() fails: TypeError"),
    (NET + "\ndef example_inputs():\n    return 1 / 0", "", "example_inputs fails: ZeroDivisionError"),
    (NET + "\ndef example_inputs(depth): pass", "", "example_inputs needs it"),
    (NET + "\nexample_inputs = {'x': 3}", "", "holds no tensor"),
    (NET + "\nexample_inputs = {1: torch.ones(2)}", "", "names of forward's arguments"),
    (NET + "\ndef example_inputs(): pass", "", "holds no tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name", "words"), REFUSED, ids=[str(r[2])[:50] for r in REFUSED])
def test_a_bad_file_is_one_line_that_says_where(text: str, name: str, words: str | None, tmp_path: Path) -> None:
    ref = write(tmp_path, text) + name
    if words is None:
        assert type(load_model(ref, SPEC).build()).__name__ == "Net"
    else:
        message = refused(ref)
        assert words in message
        assert "model.py" in message or "'n'" in message or "inputs" in message


def test_references_that_name_no_file(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "model.py")
    write(tmp_path, GOOD, "notes.txt")
    (tmp_path / "config.json").write_text("{}")
    assert "did you mean 'model.py'" in refused(str(tmp_path / "modl.py"))
    assert f"write hf:{tmp_path}" in refused(str(tmp_path))
    assert "is a directory" in refused(str(tmp_path.parent))
    assert "not a Python file" in refused(str(tmp_path / "notes.txt"))
    assert "is not a name" in refused(str(tmp_path / "model.py:a b"))
    assert "no such file" in refused(str(tmp_path / "none" / "model.py:Net"))


def test_a_wrong_argument_is_named_by_where_it_stands(tmp_path: Path) -> None:
    ref = write(tmp_path, GOOD)
    spec = write(tmp_path, "mesh: {tensor: 2}\nmodel:\n  n: 4\n  layer: 2\n", "s.yaml")
    assert f"{spec}:4: model.layer: Net takes no argument 'layer'; did you mean 'layers'" in refused(ref, spec)
    assert "--set depth: Net takes no argument 'depth'" in refused(ref, depth=3)
    spec = write(tmp_path, "mesh: {tensor: 2}\ninputs: {bach: 4}\n", "s.yaml")
    assert f"{spec}:2: inputs.bach: example_inputs takes no 'bach'; did you mean 'batch'" in refused(ref, spec)


def test_settings_are_typed_as_yaml() -> None:
    settings = ["layers=2", "rate=1e-4", "act=gelu", "sizes=[1, 2]", "bias=false", "empty=", "eq=a=b"]
    expected = {"layers": 2, "rate": 1e-4, "act": "gelu", "sizes": [1, 2], "bias": False, "empty": None, "eq": "a=b"}
    assert parse_settings(settings) == expected
    for bad in ("layers", "=3", ""):
        with pytest.raises(ModelError, match="key=value"):
            parse_settings([bad])


def test_every_form_of_example_inputs_is_a_call() -> None:
    x = torch.ones(2)
    assert as_call(x)[0] == (x,)
    assert as_call([x, None]) == ((x, None), {})
    assert as_call({"x": x}) == ((), {"x": x})
    assert as_call(((x,), {"y": 1})) == ((x,), {"y": 1})


hf = pytest.mark.skipif("not __import__('importlib').util.find_spec('transformers')", reason="needs transformers")
TINY = {
    "gpt2": {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 11},
    "bert": {"num_hidden_layers": 1, "hidden_size": 8},
}
TINY["bert"] |= {"num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 13}
TINY["t5"] = {"num_layers": 1, "d_model": 8, "d_ff": 8, "num_heads": 2, "d_kv": 4, "vocab_size": 17}


@hf
@pytest.mark.parametrize(
    ("ref", "cls", "inputs"),
    [
        ("hf:gpt2", "GPT2LMHeadModel", {"input_ids", "labels"}),
        ("hf:bert", "BertForMaskedLM", {"input_ids", "attention_mask", "labels"}),
        ("hf:t5", "T5ForConditionalGeneration", {"input_ids", "attention_mask", "labels", "decoder_input_ids"}),
        (
            "hf:bert:BertForSequenceClassification",
            "BertForSequenceClassification",
            {"input_ids", "attention_mask", "labels"},
        ),
        ("hf:bert:BertModel", "BertModel", {"input_ids", "attention_mask"}),
    ],
)
def test_hugging_face_types_train_on_their_inputs(ref: str, cls: str, inputs: set[str]) -> None:
    spec = Spec.load({"mesh": {"tensor": 2}, "inputs": {"batch": 3, "sequence": 5}})
    loaded = load_model(ref, spec, TINY[ref.split(":")[1]])
    model = loaded.build()
    args, kwargs = loaded.inputs()
    assert type(model).__name__ == cls == loaded.name
    assert not args
    assert set(kwargs) == inputs
    assert kwargs["input_ids"].shape == (3, 5)
    assert model.training
    output = model(**kwargs)
    assert getattr(output, "past_key_values", None) is None
    assert "labels" not in inputs or output.loss.isfinite()


@hf
def test_a_hugging_face_directory_gives_its_own_architecture_and_weights(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig.from_dict(TINY["bert"])
    transformers.BertModel(config).save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}", SPEC)
    assert loaded.weights == tmp_path
    assert type(loaded.build()).__name__ == "BertModel"
    assert load_model(f"hf:{tmp_path}:BertForMaskedLM", SPEC).name == "BertForMaskedLM"
    deeper = load_model(f"hf:{tmp_path}", SPEC, {"num_hidden_layers": 3}).build()
    assert "encoder.layer.2.output.dense.weight" in deeper.state_dict()


@hf
def test_hugging_face_references_that_do_not_work(tmp_path: Path) -> None:
    assert "holds no config.json" in refused(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2",\n}')
    assert "config.json:2: not JSON" in refused(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt7"}))
    assert "model_type 'gpt7' is none of transformers" in refused(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("[]")
    assert "not a JSON object" in refused(f"hf:{tmp_path}")
    assert "did you mean" in refused("hf:lama")
    assert "not downloaded" in refused("hf:gpt/two")
    assert "--set layers: GPT2Config has no 'layers'; did you mean" in refused("hf:gpt2", layers=3)
    assert "cannot be built" in refused("hf:gpt2", n_head=7)
    assert "no model class 'GPT3'" in refused("hf:gpt2:GPT3")
    assert "inputs.sequence: 0 is not a positive integer" in refused(
        "hf:gpt2", {"mesh": {"tensor": 2}, "inputs": {"sequence": 0}}
    )


def test_hugging_face_needs_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'tpcompiler[hf]'" in refused("hf:gpt2")
