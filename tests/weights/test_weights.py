"""Laws of the weights format: shard → merge is the identity for any layout, and every degree holds the same bits."""

from __future__ import annotations

import json
import multiprocessing
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tpcompiler import weights
from tpcompiler.errors import WeightsError
from tpcompiler.layout import Concat, Dim, Factor, Product, slice_on
from tpcompiler.program import Parameter
from tpcompiler.runtime import stored as on_disk
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.runtime.runs import Run, Runs, bits, intersect, length, positions, put, same_bits, slice_of
from tpcompiler.runtime.stored import DTYPES, Reader
from tpcompiler.weights import Entry, Layout, Manifest, RankRuns, Weights, tensor_files
from tpcompiler.weights.tensor_files import Spot, TensorFileWriter, in_order
from tpcompiler.weights.wire import decode, encode

Tensors = Mapping[str, torch.Tensor]
Layouts = Mapping[str, tuple[Dim, ...]]

# --- what we draw ---


@st.composite
def dims(draw: st.DrawFn, names: tuple[str, ...], depth: int = 2) -> Dim:
    """A layout of one dimension in which no mesh dimension splits two factors of a product: it has no hole."""
    kind = draw(st.sampled_from(["factor", "product", "concat"])) if depth else "factor"
    if kind == "product":
        cut = draw(st.integers(0, len(names)))
        halves = [draw(dims(part, depth - 1)) for part in (names[:cut], names[cut:])]
        return Product(tuple(draw(st.permutations(halves))))
    if kind == "concat":  # segments may be split alike, in part, or not at all: copies of what is whole overlap
        return Concat(tuple(draw(dims(draw(subsets(names)), depth - 1)) for _ in range(draw(st.integers(1, 3)))))
    return Factor(draw(st.integers(0, 5)), draw(st.sampled_from(["", "h"])), draw(subsets(names)))


def subsets(names: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(names), unique=True).map(tuple) if names else st.just(())


@st.composite
def tensor_dims(draw: st.DrawFn, names: tuple[str, ...]) -> tuple[Dim, ...]:
    """A layout of a tensor of up to 3 dimensions, each mesh dimension splitting at most one of them."""
    n = draw(st.integers(0, 3))
    home = [draw(st.integers(0, max(n - 1, 0))) for _ in names]
    return tuple(draw(dims(tuple(x for x, h in zip(names, home, strict=True) if h == d))) for d in range(n))


meshes = st.sampled_from(
    [{}, {"t": 2}, {"t": 3}, {"t": 5}, {"t": 2, "u": 2}, {"u": 3, "t": 2}, {"data": 2, "t": 4}]
).map(Mesh.of)
dtypes = st.sampled_from(sorted(DTYPES.values(), key=str))


def splitting(mesh: Mesh) -> tuple[str, ...]:
    return weights.weight_mesh(mesh).names


def random_bits(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Any bits at all, NaNs and denormals included."""
    top = 2 if dtype == torch.bool else 256
    return torch.randint(0, top, (prod(shape) * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(tuple(shape))


@dataclass(frozen=True)
class Model:
    """Tensors, and layouts of them on a mesh."""

    tensors: Tensors
    dims: Layouts
    mesh: Mesh

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(Parameter(n, n, tuple(t.shape), t.dtype) for n, t in self.tensors.items())


@st.composite
def models(draw: st.DrawFn) -> Model:
    mesh = draw(meshes)
    layouts = {f"p{i}": draw(tensor_dims(splitting(mesh))) for i in range(draw(st.integers(1, 4)))}
    tensors = {n: random_bits([d.size for d in tree], draw(dtypes)) for n, tree in layouts.items()}
    return Model(tensors, layouts, mesh)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a few hundred bytes then take several blocks, and every way of reading."""
    monkeypatch.setattr(on_disk, "BLOCK", 64)
    monkeypatch.setattr(on_disk, "_SCATTERED", 8)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


def fresh(scratch: Path) -> Path:
    """A new folder for one generated case."""
    path = scratch / str(sum(1 for _ in scratch.iterdir()))
    path.mkdir()
    return path


def indices(runs: Runs) -> list[int]:
    return [i for a, b in runs for i in range(a, b)]


def naive(tensor: torch.Tensor, runs: Sequence[Sequence[Run]]) -> torch.Tensor:
    """The slice, taken index by index."""
    out = bits(tensor)
    for d, r in enumerate(runs):
        out = torch.stack([out.select(d, i) for i in indices(tuple(r))], d) if r else out.narrow(d, 0, 0)
    return out.view(tensor.dtype)


def assert_equal(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape, name
        assert same_bits(a[name], b[name]), name


# --- index sets ---

index_sets = st.sets(st.integers(0, 30)).map(lambda s: runs_of(sorted(s)))


def runs_of(ordered: Sequence[int]) -> Runs:
    return RankRuns.of_runs(31, [tuple((i, i + 1) for i in ordered)]).runs[0]


@given(index_sets, index_sets, st.integers(0, 31), st.integers(0, 31))
def test_runs_are_the_index_sets_they_stand_for(a: Runs, b: Runs, start: int, stop: int) -> None:
    common = intersect(a, b)
    assert indices(common) == sorted(set(indices(a)) & set(indices(b)))
    assert length(a) == len(indices(a))
    assert [indices(a)[i] for i in indices(positions(common, a))] == indices(common)
    assert indices(weights.cut(a, start, stop)) == indices(a)[start:stop]


@given(st.data(), dtypes)
def test_put_undoes_slice_of_for_any_runs(data: st.DataObject, dtype: torch.dtype) -> None:
    shape = data.draw(st.lists(st.sampled_from([1, 7, 31]), max_size=3))
    runs = tuple(intersect(data.draw(index_sets), ((0, n),)) for n in shape)
    tensor = random_bits(shape, dtype)
    part = slice_of(tensor, runs)
    assert same_bits(part, naive(tensor, runs))
    target = tensor.clone()
    put(target, runs, torch.zeros_like(part))
    assert not bits(slice_of(target, runs)).any()
    put(target, runs, part)
    assert same_bits(target, tensor)


def test_many_runs_go_by_index() -> None:
    every_other: Runs = tuple((i, i + 1) for i in range(0, 200, 2))
    tensor = torch.randn(200, 200)
    runs = (every_other, every_other)
    assert torch.equal(slice_of(tensor, runs), tensor[::2, ::2])
    target = torch.zeros(200, 200)
    put(target, runs, tensor[::2, ::2])
    assert torch.equal(target[::2, ::2], tensor[::2, ::2])
    assert target.count_nonzero() == tensor[::2, ::2].count_nonzero()


@given(st.data(), meshes)
def test_cells_part_a_tensor_by_its_holders(data: st.DataObject, mesh: Mesh) -> None:
    mesh = weights.weight_mesh(mesh)
    layout = Layout.of(data.draw(tensor_dims(mesh.names)), mesh)
    layout.check("p")
    held = [set(product(*map(indices, layout.runs(r)))) for r in range(mesh.size)]
    seen: set[tuple[int, ...]] = set()
    for cell in layout.cells:
        here = set(product(*map(indices, cell.runs)))
        assert not here & seen
        assert all((here <= held[r]) if r in cell.ranks else not (here & held[r]) for r in range(mesh.size) if here)
        seen |= here
    assert seen == set(product(*(range(n) for n in layout.shape)))


def test_a_layout_that_leaves_elements_out_is_refused() -> None:
    square = (Factor(4, "h", ("t",)), Factor(4, "h", ("t",)))
    with pytest.raises(WeightsError, match=r"w \[4, 4\]: no rank holds element \[0, 2\]"):
        Layout.of(square, Mesh.of({"t": 2})).check("w")


@given(st.lists(st.tuples(index_sets, index_sets), min_size=1, max_size=4))
def test_exactly_the_layouts_with_a_hole_are_refused(slices: list[tuple[Runs, Runs]]) -> None:
    """Index sets per rank that come from nowhere: a layout is accepted when their products cover the tensor."""
    slices = [(intersect(a, ((0, 3),)), b and ((0, 2),)) for a, b in slices]
    layout = Layout(tuple(RankRuns.of_runs(n, [s[d] for s in slices]) for d, n in enumerate((3, 2))), len(slices))
    held = {e for s in slices for e in product(*map(indices, s))}
    try:
        layout.check("w")
        accepted = True
    except WeightsError:
        accepted = False
    assert accepted == (held == set(product(range(3), range(2))))


# --- safetensors files ---


@given(st.data())
def test_files_are_those_of_the_safetensors_library(scratch: Path, data: st.DataObject) -> None:
    there = fresh(scratch)
    shapes = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=5))
    tensors = {f"t{i}": random_bits(shape, data.draw(dtypes)) for i, shape in enumerate(shapes)}
    info = weights.write_file(there / "ours.safetensors", tensors)
    assert info == tensor_files.digest(there / "ours.safetensors")
    assert_equal(load_file(there / "ours.safetensors"), tensors)
    save_file(dict(tensors), there / "theirs.safetensors")
    reader = Reader(there / "theirs.safetensors")
    for name, t in tensors.items():
        runs = tuple(intersect(data.draw(index_sets), ((0, n),)) for n in t.shape)
        assert same_bits(reader.read(name), t)
        assert same_bits(reader.read(name, runs), naive(t, runs))
    reader.close()


def test_a_run_of_rows_reads_its_own_bytes_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.write_file(tmp_path / "f.safetensors", {"w": torch.arange(64.0).view(16, 4)})
    reader = Reader(tmp_path / "f.safetensors")
    asked: list[int] = []
    fill = Reader._fill

    def counted(self: Reader, buffer: memoryview, offset: int) -> None:
        asked.append(len(buffer))
        fill(self, buffer, offset)

    monkeypatch.setattr(Reader, "_fill", counted)
    reader.read("w", (((2, 5), (9, 11)), ((0, 4),)))
    assert asked == [3 * 16, 2 * 16]
    reader.close()


# --- shard, merge, reshard ---


@given(models())
@settings(max_examples=60)
def test_shard_then_merge_is_the_identity_bit_for_bit(scratch: Path, model: Model) -> None:
    there = fresh(scratch)
    manifest = weights.shard(
        model.tensors, model.parameters, model.dims, model.mesh, there / "sharded", spec={"seed": 1}
    )
    mesh = weights.weight_mesh(model.mesh)
    for rank in range(mesh.size):
        mine = {n: naive(t, [d.runs(mesh, mesh.coords(rank)) for d in model.dims[n]]) for n, t in model.tensors.items()}
        assert_equal(load_file(there / f"sharded/rank-{rank:05d}.safetensors"), mine)
    weights.merge(there / "sharded", there / "merged.safetensors")
    assert_equal(load_file(there / "merged.safetensors"), model.tensors)
    assert weights.load_manifest(there / "sharded") == manifest
    assert sorted(p.name for p in there.iterdir()) == ["merged.safetensors", "sharded"]


@given(models(), st.data())
@settings(max_examples=40)
def test_any_rank_of_any_other_mesh_can_load(scratch: Path, model: Model, data: st.DataObject) -> None:
    there = fresh(scratch) / "sharded"
    weights.shard(model.tensors, model.parameters, model.dims, model.mesh, there)
    other = weights.weight_mesh(data.draw(meshes))
    with Weights(there, compare_copies=True) as source:
        for name, t in model.tensors.items():
            tree = tuple(resplit(d, other, data) for d in model.dims[name])
            for rank in range(other.size):
                coords = other.coords(rank)
                expected = naive(t, [d.runs(other, coords) for d in tree])
                assert same_bits(source.read(name, slice_on(tree, other, coords)), expected)


def resplit(dim: Dim, mesh: Mesh, data: st.DataObject) -> Dim:
    """The same sizes, split over another mesh in another way."""
    match dim:
        case Product(parts):
            return Product(tuple(resplit(p, mesh, data) for p in parts))
        case Concat(parts):
            return Concat(tuple(resplit(p, mesh, data) for p in parts))
    return Factor(dim.size, "", data.draw(subsets(mesh.names)))


HEADS = Product((Factor(25, "heads", ("t",)), Factor(2)))
FUSED = Model(
    {
        "qkv.weight": random_bits((150, 6), torch.bfloat16),
        "qkv.bias": random_bits((150,), torch.float32),
        "out.weight": random_bits((6, 50), torch.bfloat16),
        "up.weight": random_bits((37, 6), torch.float16),
        "norm": random_bits((6,), torch.float32),
        "strided": random_bits((6, 75), torch.float64),
    },
    {
        "qkv.weight": (Concat((HEADS, HEADS, HEADS)), Factor(6)),
        "qkv.bias": (Concat((HEADS, HEADS, HEADS)),),
        "out.weight": (Factor(6), HEADS),
        "up.weight": (Factor(37, "ff", ("t",)), Factor(6)),
        "norm": (Factor(6),),
        "strided": (Factor(6), Product((Factor(3), Factor(25, "heads", ("t",))))),
    },
    Mesh.of({"t": 8}),
)


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_reshard_8_3_5_8_returns_the_same_bytes(tmp_path: Path) -> None:
    first = tmp_path / "8"
    weights.shard(FUSED.tensors, FUSED.parameters, FUSED.dims, FUSED.mesh, first, spec={"mesh": {"t": 8}})
    at = first
    for step, degree in enumerate((3, 5, 8)):
        out = tmp_path / f"step{step}"
        weights.reshard(at, FUSED.dims, Mesh.of({"t": degree}), out, spec={"mesh": {"t": degree}})
        assert len(list(out.glob("rank-*"))) == degree
        at = out
    assert contents(at) == contents(first)


def test_a_mesh_factored_in_two_holds_kv_in_subgroups_and_reshards(tmp_path: Path) -> None:
    kv = (Factor(2, "kv", ("kv",)), Factor(3))
    q = (Product((Factor(2, "kv", ("kv",)), Factor(4, "group", ("group",)))), Factor(3))
    model = Model(
        {"k": random_bits((2, 3), torch.float32), "q": random_bits((8, 3), torch.float32)},
        {"k": kv, "q": q},
        Mesh.of({"kv": 2, "group": 4}),
    )
    weights.shard(model.tensors, model.parameters, model.dims, model.mesh, tmp_path / "a")
    one = {"k": tuple(map(Factor, (2, 3))), "q": tuple(map(Factor, (8, 3)))}
    weights.reshard(tmp_path / "a", one, Mesh.of({}), tmp_path / "b", spec={})
    assert_equal(load_file(tmp_path / "b/rank-00000.safetensors"), model.tensors)


def test_memory_stays_below_two_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_disk, "BLOCK", 1 << 20)
    monkeypatch.setattr(on_disk, "_SCATTERED", 4096)
    rows, columns, count = 2048, 1024, 16  # 8 MiB each, 128 MiB in all
    spots = [Spot(f"w{i}", torch.float32, (rows, columns)) for i in range(count)]
    with TensorFileWriter(tmp_path / "in.safetensors", spots) as writer:
        for _ in spots:
            writer.write(torch.randn(rows, columns))
        writer.close()
    heads = Factor(columns, "h", ("t",))
    tree = {
        s.name: (Factor(rows), heads) if i % 2 else (Factor(rows, "r", ("t",)), Factor(columns))
        for i, s in enumerate(spots)
    }
    parameters = [Parameter(s.name, s.name, s.shape, s.dtype) for s in spots]

    def work(grown: multiprocessing.Queue[int]) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        weights.shard(tmp_path / "in.safetensors", parameters, tree, Mesh.of({"t": 4}), tmp_path / "a")
        weights.reshard(tmp_path / "a", tree, Mesh.of({"t": 3}), tmp_path / "b", spec={})
        weights.merge(tmp_path / "b", tmp_path / "out.safetensors")
        grown.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    context = multiprocessing.get_context("fork")
    grown: multiprocessing.Queue[int] = context.Queue()
    process = context.Process(target=work, args=(grown,))
    process.start()
    kib = grown.get(timeout=120)
    process.join()
    assert kib < 2 * 8 * 1024
    assert (
        tensor_files.digest(tmp_path / "in.safetensors").sha256
        == tensor_files.digest(tmp_path / "out.safetensors").sha256
    )


# --- sources ---


@given(models(), st.sampled_from(["file", "sharded", "pt", "bin index", "directory", "manifest"]))
@settings(max_examples=40)
def test_every_kind_of_source_gives_the_same_shards(scratch: Path, model: Model, kind: str) -> None:
    there = fresh(scratch)
    weights.shard(model.tensors, model.parameters, model.dims, model.mesh, there / "expected")
    source = saved(model.tensors, there, kind)
    weights.shard(source, model.parameters, model.dims, model.mesh, there / "found")
    assert contents(there / "found") == contents(there / "expected")


def saved(tensors: Tensors, there: Path, kind: str) -> Path:
    """The tensors in one of the forms that weights come in."""
    plain = there / "in"
    plain.mkdir()
    match kind:
        case "file":
            save_file(dict(tensors), plain / "x.safetensors")
            return plain / "x.safetensors"
        case "directory":
            save_file(dict(tensors), plain / "model.safetensors")
        case "pt":
            torch.save({"state_dict": dict(tensors), "epoch": 3}, plain / "x.pt")
            return plain / "x.pt"
        case "manifest":
            whole = {n: tuple(map(Factor, t.shape)) for n, t in tensors.items()}
            return directory_of(Model(tensors, whole, Mesh.of({"t": 3})), plain / "m")
        case "sharded":
            directory_of(
                Model(tensors, {n: tuple(map(Factor, t.shape)) for n, t in tensors.items()}, Mesh.of({})), there / "m"
            )
            weights.merge(there / "m", plain / "parts", max_file=50)
            return plain / "parts"
        case "bin index":
            for i, (n, t) in enumerate(tensors.items()):
                torch.save({n: t}, plain / f"part-{i}.bin")
            index = {"weight_map": {n: f"part-{i}.bin" for i, n in enumerate(tensors)}}
            (plain / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return plain


def directory_of(model: Model, path: Path) -> Path:
    weights.shard(model.tensors, model.parameters, model.dims, model.mesh, path)
    return path


def test_tied_names_are_one_tensor_and_come_back_as_they_came(tmp_path: Path) -> None:
    wte = torch.randn(6, 4)
    tied = Parameter("wte", "wte", (6, 4), torch.float32, aliases=("head",))
    layout = {"wte": (Factor(6, "v", ("t",)), Factor(4))}
    for stored in ({"wte": wte}, {"head": wte}, {"wte": wte, "head": wte.clone()}):
        weights.shard(stored, [tied], layout, Mesh.of({"t": 4}), tmp_path / "d")
        assert list(load_file(tmp_path / "d/rank-00000.safetensors")) == ["wte"]
        weights.merge(tmp_path / "d", tmp_path / "m.safetensors")
        assert_equal(load_file(tmp_path / "m.safetensors"), stored)
    with pytest.raises(WeightsError, match="wte and head differ, but the model ties them"):
        weights.shard({"wte": wte, "head": wte + 1}, [tied], layout, Mesh.of({"t": 4}), tmp_path / "d")
    assert_equal(load_file(tmp_path / "m.safetensors"), {"wte": wte, "head": wte})  # the old output stands


def test_what_the_model_lacks_is_kept_and_buffers_come_from_the_model(tmp_path: Path) -> None:
    stored = {"w": torch.randn(4), "pooler.weight": torch.randn(3), "mask": torch.ones(2)}
    parameters = [
        Parameter("w", "w", (4,), torch.float32),
        Parameter("mask", "mask", (2,), torch.float32, buffer=True, value=torch.zeros(2)),
        Parameter("freq", "freq", (3,), torch.float32, buffer=True, persistent=False, value=torch.arange(3.0)),
        Parameter("slopes", "slopes", (4,), torch.float32, buffer=True, value=torch.arange(4.0)),
    ]
    split = (Factor(4, "h", ("t",)),)
    dims = {"w": split, "slopes": split, "mask": (Factor(2),), "freq": (Factor(3),)}
    weights.shard(stored, parameters, dims, Mesh.of({"t": 2}), tmp_path / "d")
    assert_equal(load_file(tmp_path / "d/buffers.safetensors"), {"mask": torch.ones(2), "freq": torch.arange(3.0)})
    assert_equal(
        load_file(tmp_path / "d/rank-00001.safetensors"), {"w": stored["w"][2:], "slopes": torch.tensor([2.0, 3.0])}
    )
    weights.merge(tmp_path / "d", tmp_path / "m.safetensors")
    assert_equal(load_file(tmp_path / "m.safetensors"), stored)


def test_without_weights_there_are_buffers_and_a_clear_word(tmp_path: Path) -> None:
    parameters = [
        Parameter("w", "w", (4,), torch.float32),
        Parameter("freq", "freq", (3,), torch.float32, buffer=True, value=torch.arange(3.0)),
    ]
    dims = {"w": (Factor(4, "h", ("t",)),), "freq": (Factor(3),)}
    manifest = weights.shard(None, parameters, dims, Mesh.of({"t": 2}), tmp_path / "d")
    assert not manifest.has_weights
    assert sorted(contents(tmp_path / "d")) == ["buffers.safetensors", "manifest.json"]
    assert weights.load_manifest(tmp_path / "d").by_name["w"].layout.local_shape(1) == (2,)
    for work in (weights.merge, lambda d, out: weights.reshard(d, {}, Mesh.of({}), out, spec={})):
        with pytest.raises(WeightsError, match="holds no weights, only the program"):
            work(tmp_path / "d", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_floating_parameters_are_converted_on_request_and_nothing_else(tmp_path: Path) -> None:
    stored = {"w": torch.randn(5), "ids": torch.arange(3), "extra": torch.randn(2)}
    parameters = [Parameter("w", "w", (5,), torch.float32), Parameter("ids", "ids", (3,), torch.int64)]
    layout = {"w": (Factor(5, "h", ("t",)),), "ids": (Factor(3),)}
    weights.shard(stored, parameters, layout, Mesh.of({"t": 2}), tmp_path / "d", dtype=torch.bfloat16)
    weights.merge(tmp_path / "d", tmp_path / "m.safetensors")
    assert_equal(load_file(tmp_path / "m.safetensors"), stored | {"w": stored["w"].bfloat16()})


def test_names_and_shapes_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    parameters = [Parameter(f"layer.{i}.weight", "", (4, 2), torch.float32) for i in range(3)]
    layout = {p.name: (Factor(4, "h", ("t",)), Factor(2)) for p in parameters}
    good = {p.name: torch.zeros(4, 2) for p in parameters}
    wrong = {
        r"layer\.1\.weight is \[2, 4\], the model's layer\.1\.weight is \[4, 2\]": good
        | {"layer.1.weight": torch.zeros(2, 4)},
        r"no layer\.0\.weight and 2 more: its names begin with 'bert\.'": {"bert." + n: t for n, t in good.items()},
        r"no layer\.2\.weight; nearest: layers\.2\.weight": {
            n.replace("layer.2", "layers.2"): t for n, t in good.items()
        },
        r"no layer\.0\.weight and 2 more; no name in it is near": {"x": torch.zeros(4, 2)},
        r"layer\.2\.weight has no values \(device meta\)": good | {"layer.2.weight": torch.zeros(4, 2, device="meta")},
    }
    for message, source in wrong.items():
        with pytest.raises(WeightsError, match=message):
            weights.shard(source, parameters, layout, Mesh.of({"t": 2}), tmp_path / "d")
        assert not list(tmp_path.iterdir())
    prefixed = {"bert." + n: t for n, t in good.items()}
    weights.shard(prefixed, parameters, layout, Mesh.of({"t": 2}), tmp_path / "d", strip="bert.")
    weights.merge(tmp_path / "d", tmp_path / "m.safetensors")
    assert_equal(load_file(tmp_path / "m.safetensors"), prefixed)


# --- manifests ---


@given(models())
def test_a_manifest_reads_back_as_it_was_written(model: Model) -> None:
    entries = weights.entries_of(model.parameters, model.dims, model.mesh)
    info = tensor_files.FileInfo("rank-00000.safetensors", 3, "ab")
    manifest = Manifest(weights.weight_mesh(model.mesh), entries, (info,), {"mesh": {"t": 2}, "name": "größe"})
    assert decode(encode(manifest).encode(), Path("manifest.json")) == manifest
    assert len(str(manifest).splitlines()) == 1 + len(entries)


def test_a_checkpoint_carries_optimizer_state_of_fsdp_chunks_and_reshards(tmp_path: Path) -> None:
    """Four processes, tensor 2 × data 2; each holds a chunk of rows of its slice, and the same of the moments."""
    mesh = Mesh.of({"data": 2, "t": 2})
    tree = (Product((Factor(3), Factor(4, "h", ("t",)))), Factor(5))
    values = {"w": torch.randn(12, 5), "exp_avg/w": torch.randn(12, 5), "step": torch.tensor(7)}
    slices = []
    for rank in range(mesh.size):
        coords = mesh.coords(rank)
        rows = tree[0].runs(mesh, coords)
        half = (length(rows) + 1) // 2  # FSDP's chunks are rounded up
        slices.append(weights.cut(rows, coords["data"] * half, (coords["data"] + 1) * half))
    layout = Layout((RankRuns.of_runs(12, slices), RankRuns.of(tree[1], mesh)), mesh.size)
    entries = (
        Entry("w", "parameter", torch.float32, layout, stored=("w",)),
        Entry("exp_avg/w", "state", torch.float32, layout, "optimizer-{rank:05d}.safetensors", like="w"),
        Entry("step", "state", torch.int64, Layout((), mesh.size), "optimizer-{rank:05d}.safetensors"),
    )
    here = tmp_path / "checkpoint"
    with weights.output(here) as new:
        infos = [weights.write_text(new / "state.json", '{"sample": 41}\n')]
        for rank in range(mesh.size):
            for file in ("rank", "optimizer"):
                mine = {
                    e.name: slice_of(values[e.name], e.layout.runs(rank)) for e in entries if e.file.startswith(file)
                }
                infos.append(weights.write_file(new / f"{file}-{rank:05d}.safetensors", mine))
        weights.save_manifest(Manifest(mesh, entries, spec={}).with_files(infos), new)
    weights.merge(here, tmp_path / "m.safetensors")
    assert_equal(load_file(tmp_path / "m.safetensors"), {"w": values["w"]})
    weights.reshard(here, {"w": tree}, Mesh.of({"t": 3}), tmp_path / "three", spec={})
    assert (tmp_path / "three/state.json").read_text() == '{"sample": 41}\n'
    coords = {"t": 1}
    moments = naive(values["exp_avg/w"], [d.runs(Mesh.of({"t": 3}), coords) for d in tree])
    assert_equal(
        load_file(tmp_path / "three/optimizer-00001.safetensors"), {"exp_avg/w": moments, "step": values["step"]}
    )


def test_the_reader_in_the_documentation_needs_nothing_of_ours(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/format.md").read_text()
    code = next(block for block in page.split("```python\n") if "def merged(" in block).split("```")[0]
    assert "tpcompiler" not in code
    found: dict[str, Callable[[Path, str], torch.Tensor]] = {}
    exec(code, found)
    directory_of(FUSED, tmp_path / "d")
    for name, t in FUSED.tensors.items():
        assert same_bits(found["merged"](tmp_path / "d", name), t)


def test_spots_in_order_keep_every_tensor_aligned(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, dtype=torch.uint8),
        "b": torch.zeros(3, dtype=torch.float64),
        "c": torch.zeros(1).half(),
    }
    weights.write_file(tmp_path / "f.safetensors", tensors)
    reader = Reader(tmp_path / "f.safetensors")
    assert all(t.start % t.dtype.itemsize == 0 for t in reader.tensors.values())
    assert [s.name for s in in_order(Spot(n, t.dtype, (1,)) for n, t in tensors.items())] == ["b", "c", "a"]
    reader.close()
