"""Tokens chosen without gathering scores, and prompts through places: the same text at every degree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tpcompiler as tpc
from models.gpt2 import GPT2
from tests.decode.growing import Growing, build, growing
from tpcompiler.cli.main import main
from tpcompiler.errors import TpcError
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.generation.prompts import Text, read_prompts
from tpcompiler.generation.stream import Served, Stream, Token, Wish
from tpcompiler.runtime import Mesh, Ranks
from tpcompiler.runtime.mesh import part
from tpcompiler.runtime.sample import Sampling, choose, held, penalise
from tpcompiler.train.data.tokenizer import ByteTokenizer

WORDS = 23


def chosen(scores: Tensor, how: Sampling, degree: int, positions: Tensor | None = None) -> list[list[int]]:
    """What each rank of `degree` chooses."""
    numbers = torch.arange(len(scores))
    at = numbers if positions is None else positions

    def rank(ranks: Ranks) -> list[int]:
        rows = (part(scores.shape[1], degree, ranks.rank),)
        mine = held(rows, "cpu")
        tokens: list[int] = choose(scores[:, mine], mine, ranks.group("tensor"), how, numbers, at).tolist()
        return tokens

    return run_ranks(Mesh.of({"tensor": degree}), rank)


def allowed(scores: Tensor, how: Sampling) -> Tensor:
    """The probabilities of one row of scores [v] under the settings, by their definitions."""
    x = scores.float() / how.temperature
    order = sorted(range(len(x)), key=lambda i: (-float(x[i]), i))
    if how.top_k:
        order = order[: how.top_k]
    p = torch.zeros(len(x), dtype=torch.float64)
    p[order] = x[order].double().softmax(0)
    if how.top_p < 1:
        above = torch.tensor([float(p[x > x[i]].sum()) for i in range(len(x))])
        p[above >= how.top_p] = 0
    return p / p.sum()


@given(
    st.integers(0, 10**6),
    st.integers(0, WORDS + 3),
    st.sampled_from([0.05, 0.3, 0.71, 0.95, 1.0]),
    st.sampled_from([0.0, 0.4, 1.0, 1.7]),
    st.booleans(),
)
@settings(max_examples=25)
def test_every_degree_chooses_alike_and_within_what_is_allowed(
    seed: int, top_k: int, top_p: float, temperature: float, ties: bool
) -> None:
    scores = torch.randn(4, WORDS, generator=torch.Generator().manual_seed(seed)) * 3
    scores = scores.round() if ties else scores
    how = Sampling(temperature, top_k, top_p, seed=seed)
    (expected,) = chosen(scores, how, 1)
    for degree in (2, 3, WORDS + 1):
        assert all(tokens == expected for tokens in chosen(scores, how, degree))
    for row, token in zip(scores, expected, strict=True):
        assert allowed(row, how)[token] > 0 if temperature else token == int(row.argmax())


@pytest.mark.parametrize("how", [Sampling(0.8), Sampling(1.3, top_k=5), Sampling(top_p=0.6), Sampling(1, 9, 0.8)])
def test_tokens_come_as_often_as_their_probability_says(how: Sampling) -> None:
    row, n = torch.randn(WORDS, generator=torch.Generator().manual_seed(1)) * 2, 8000
    tokens = chosen(row.expand(n, -1), how, 2, torch.zeros(n, dtype=torch.int64))[0]
    found, p = torch.bincount(torch.tensor(tokens), minlength=WORDS).double(), allowed(row, how)
    assert (found[p == 0] == 0).all()
    deviation = (found - n * p)[p > 0] / (n * p * (1 - p) + 1e-9).sqrt()[p > 0]
    assert float(deviation.abs().max()) < 5


def test_another_seed_sequence_or_position_is_another_draw() -> None:
    flat = torch.zeros(1, 4096)
    draws = {chosen(flat, Sampling(seed=s), 1, torch.tensor([at]))[0][0] for s in (0, 1, 2**33) for at in (0, 1)}
    assert len(draws) == 6
    assert len(set(chosen(flat.expand(6, -1), Sampling(), 1, torch.zeros(6, dtype=torch.int64))[0])) == 6


def test_a_penalty_makes_what_was_there_less_likely_on_both_sides_of_zero() -> None:
    seen = torch.tensor([[True, True, False]])
    assert penalise(torch.tensor([[2.0, -2.0, 2.0]]), seen, 2.0).tolist() == [[1.0, -4.0, 2.0]]


PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7], [3, 1], [5, 5, 5, 5], [11, 2]]


def streamed(it: Growing, prompts: list[list[int]], wish: Wish) -> list[list[Token]]:
    """All tokens as each rank sees them."""

    def rank(ranks: Ranks) -> list[Token]:
        return list(Stream(Served(it.decoder, ranks, it.held(ranks), torch.device("cpu")), prompts, wish))

    return run_ranks(it.program.mesh, rank)


def texts(tokens: list[Token], n: int) -> list[list[int]]:
    return [[t.token for t in tokens if t.prompt == i] for i in range(n)]


@pytest.fixture(scope="module")
def degrees() -> dict[int, Growing]:
    out = {}
    for degree in (1, 3):
        torch.manual_seed(3)
        out[degree] = growing(*build("llama"), degree)
    return out


@pytest.mark.parametrize("how", [Sampling(0), Sampling(0.9, top_p=0.9, seed=4, repetition_penalty=1.3)])
def test_the_same_seed_gives_the_same_text_at_every_degree_and_in_any_company(
    degrees: dict[int, Growing], how: Sampling
) -> None:
    (expected,) = streamed(degrees[1], PROMPTS, Wish(6, how, batch=1))
    assert texts(expected, 6) != [[]] * 6 and all(len(t) == 6 for t in texts(expected, 6))
    for tokens in streamed(degrees[3], PROMPTS, Wish(6, how, batch=4)):
        assert texts(tokens, 6) == texts(expected, 6)


def test_greedy_tokens_are_those_of_the_whole_model(degrees: dict[int, Growing]) -> None:
    it = degrees[3]
    (first, *_) = streamed(it, PROMPTS, Wish(4, Sampling(0), batch=2))
    for prompt, new in zip(PROMPTS, texts(first, 6), strict=True):
        for k, token in enumerate(new):
            logits = it.full(torch.tensor([prompt + new[:k]]))
            assert token == int(logits[0, -1].argmax())


def test_a_stop_token_ends_a_text_and_its_place_goes_to_the_next(degrees: dict[int, Growing]) -> None:
    (plain,) = streamed(degrees[1], PROMPTS, Wish(6, Sampling(0), batch=2))
    stop = texts(plain, 6)[0][2]
    (stopped,) = streamed(degrees[1], PROMPTS, Wish(6, Sampling(0), stop={stop}, batch=2))
    for whole, short in zip(texts(plain, 6), texts(stopped, 6), strict=True):
        assert short == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert sum(t.last for t in stopped) == 6


def test_a_model_of_one_length_generates_prompt_by_prompt() -> None:
    it = growing(*build("bmm"), 2)
    first, second = streamed(it, PROMPTS[:3], Wish(3, Sampling(seed=1), batch=3))
    assert first == second
    assert [len(t) for t in texts(first, 3)] == [3, 3, 3]


@pytest.mark.parametrize(
    ("prompts", "tokens", "says"),
    [
        ([[1], []], 4, "prompt 2 is empty"),
        ([[1] * 20], 9, r"a prompt of 20 tokens and 9 new ones: .*"),
        ([[1, 61]], 4, "holds token id 61, but .*wte.* has 61 rows"),
        ([[1]], 0, "0 tokens in batches of 8"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_before_anything_runs(
    gpt2: Growing, prompts: list[list[int]], tokens: int, says: str
) -> None:
    with pytest.raises(TpcError, match=says) as e:
        streamed(gpt2, prompts, Wish(tokens))
    assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def gpt2() -> Growing:
    return growing(*build("gpt2"), 1)


@pytest.mark.parametrize("line", ['"a', "{}", '{"prompt": 3}', '""', "[1]"])
def test_a_malformed_line_among_many_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('"good"\n{"prompt": "fine"}\n\n' + line + '\n{"text": "well"}\n')
    with pytest.raises(TpcError, match=r"p\.jsonl:4: no"):
        read_prompts(file)
    file.write_text('"good"\n{"prompt": "fine"}\n\n{"text": "well"}\n')
    assert read_prompts(file) == ["good", "fine", "well"]


@given(st.text(max_size=8))
@settings(max_examples=30)
def test_what_is_shown_as_it_grows_is_the_text(text: str) -> None:
    ids = list(text.encode("utf-8", "surrogatepass"))
    grown = Text(ByteTokenizer())
    shown = "".join(grown.take(token, i == len(ids) - 1) for i, token in enumerate(ids))
    assert shown == grown.whole == ByteTokenizer().decode(ids)


def plain(seed: int = 2) -> GPT2:
    torch.manual_seed(seed)
    return GPT2(vocab=261, positions=24, hidden=16, heads=2, layers=1)


def greedy(model: nn.Module, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model.eval()(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_from_python_every_token_comes_as_it_is_chosen() -> None:
    model = plain()
    example = {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}
    found = tpc.generate(model, example, {"mesh": {"tensor": 1}}, PROMPTS[:2], tokens=4, temperature=0)
    assert texts(list(found), 2) == [greedy(model, p, 4) for p in PROMPTS[:2]]


def command(tmp_path: Path, *more: str) -> list[str]:
    safetensors.torch.save_file({k: v.clone() for k, v in plain().state_dict().items()}, tmp_path / "w.safetensors")
    (tmp_path / "spec.yaml").write_text(
        "mesh: {tensor: 1}\nmodel: {vocab: 261, positions: 24, hidden: 16, heads: 2, layers: 1}\n"
        "inputs: {vocab: 261}\ntrain: {precision: fp32}\n"
    )
    model = str(Path(__file__).parents[2] / "models" / "gpt2.py")
    files = ["--spec", str(tmp_path / "spec.yaml"), "--weights", str(tmp_path / "w.safetensors"), "--device", "cpu"]
    return ["generate", model, *files, *more]


def test_from_the_command_line_each_finished_text_is_a_line_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('"ab"\n{"prompt": "wxyz"}\n"q"\n')
    out = tmp_path / "out.jsonl"
    given = ("--prompts", str(tmp_path / "p.jsonl"), "--temperature", "0", "--tokens", "5", "-o", str(out), "--json")
    assert main(command(tmp_path, *given)) == 0
    report = json.loads(capsys.readouterr().out)
    expected = [ByteTokenizer().decode(greedy(plain(), list(p.encode()), 5)) for p in ("ab", "wxyz", "q")]
    assert report["texts"] == expected
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((x["number"], x["prompt"], x["text"]) for x in lines) == [
        (i + 1, p, t) for i, (p, t) in enumerate(zip(("ab", "wxyz", "q"), expected, strict=True))
    ]
    assert main(command(tmp_path, *given)) == 2  # the results are not written over
    assert "exists already" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "--prompt TEXT or --prompts FILE"),
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt", "a", "--top-p", "0"), "--top-p 0.0 must be above 0"),
        (("--prompt", "a" * 20), "20 tokens and 64 new ones"),
        (("--prompts", "nowhere.jsonl"), "nowhere.jsonl: No such file"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, more: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, *more, "--json")) == 2
    assert says in json.loads(capsys.readouterr().out)["error"]
