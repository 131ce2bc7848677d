"""What a run shows and writes: records, the display, curves, FLOPs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.bert import Bert
from models.bert import example_inputs as bert_inputs
from models.gpt2 import GPT2
from models.gpt2 import example_inputs as gpt2_inputs
from models.llama import Llama
from tpcompiler.errors import TpcError
from tpcompiler.train.show.display import Display, Meter, facts, line, sparkline
from tpcompiler.train.show.log import NAME, RunLog, StepRecord, TensorBoardLog, read_log
from tpcompiler.train.show.plot import plot
from tpcompiler.train.step.flops import flops_per_token, forward_flops, peak_tflops

FULL = StepRecord(
    step=30,
    loss=4.25,
    lr=1e-4,
    grad_norm=0.5,
    tokens=30_000,
    seconds=2.0,
    tokens_per_second=12_345.0,
    tflops=470.0,
    peak_fraction=0.475,
    memory=3 << 30,
    loss_scale=65536.0,
    skipped=2,
    evaluation=4.5,
)


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    records = [FULL, StepRecord(step=31, loss=float("nan")), StepRecord(step=32)]
    with RunLog(tmp_path, tensorboard=False) as log:
        for r in records:
            log.write(r)
            assert read_log(tmp_path)[-1].step == r.step  # on disk at once
    back = read_log(tmp_path)
    assert back[0] == FULL
    assert back[1].loss != back[1].loss
    assert back[2] == records[2]


def test_going_on_forgets_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 6):
            log.write(StepRecord(step=step, loss=float(step)))
    with (tmp_path / NAME).open("ab") as f:
        f.write(b'{"step": 6, "lo')
    assert [r.step for r in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    with RunLog(tmp_path, resumed=3, tensorboard=False) as log:
        log.write(StepRecord(step=4, loss=40.0))
    assert [(r.step, r.loss) for r in read_log(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_what_is_written_is_json_and_a_corrupt_line_does_not_stop_a_run_that_goes_on(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    with RunLog(tmp_path, tensorboard=False) as log:
        log.write(StepRecord(step=1, loss=float("nan"), grad_norm=float("inf")))
        log.write(StepRecord(step=2, loss=2.0))
    path = tmp_path / NAME
    for line_ in path.read_text().splitlines():
        json.loads(line_, parse_constant=refuse)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\xff rubbish\n" + second)
    with RunLog(tmp_path, resumed=2, tensorboard=False) as log:
        log.write(StepRecord(step=3, loss=3.0))
    assert [r.step for r in read_log(tmp_path)] == [1, 2, 3]


def test_a_full_disk_costs_records_and_is_said_once(tmp_path: Path) -> None:
    class Full:
        def add_scalar(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

        close = add_scalar

    lost: list[str] = []
    with RunLog(tmp_path, tensorboard=False, lost=lost.append) as log:
        log._writers.append(TensorBoardLog(Full()))
        for step in (1, 2, 3):
            log.write(StepRecord(step=step, loss=1.0))
    assert len(lost) == 1
    assert "training continues" in lost[0]
    assert [r.step for r in read_log(tmp_path)] == [1, 2, 3]


def test_the_panel_shows_small_rates_at_80_columns_and_is_drawn_rarely() -> None:
    out = io.StringIO()
    drawn = 0
    with Display("a run", 500, Console(file=out, force_terminal=True, width=80, color_system=None)) as display:
        draw = display._draw

        def counted() -> None:
            nonlocal drawn
            drawn += 1
            draw()

        display._draw = counted  # type: ignore[method-assign]
        for step in range(1, 401):
            display.show(StepRecord(step=step, loss=1.0, lr=1.2e-4, grad_norm=0.5, tokens_per_second=1e6, seconds=0.1))
    assert "0.00012" in out.getvalue()
    assert drawn < 10


def test_logs_that_are_none_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(TpcError, match=r"log\.jsonl: No such file"):
        read_log(tmp_path)
    (tmp_path / NAME).write_text('{"step": 1}\nrubbish\n')
    with pytest.raises(TpcError, match=r"log\.jsonl:2: not a record"):
        read_log(tmp_path)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, tensorboard=True) as log:
        log.write(FULL)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(FULL.values()) - {"step"}
    (event,) = events.Scalars("loss")
    assert (event.step, event.value) == (30, 4.25)


def test_a_terminal_gets_a_panel_and_a_file_gets_lines() -> None:
    shown = {}
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
        with Display("a run", 90, console) as display:
            for step in (10, 20, 30):
                display.show(StepRecord(step=step, loss=5.0 - step / 40))
            display.show(FULL)
            display.message("checkpoint 30 [ok]")
        shown[terminal] = out.getvalue()
    for text in shown.values():
        for word in ("30/90", "4.2500", "12.3 k", "47.5%", "3.00 GiB", "65536", "0.5", "0:02:00", "checkpoint 30 [ok]"):
            assert word in text
    assert "╭─ a run" in shown[True]
    assert "█" in shown[True]
    assert len(shown[False].splitlines()) == 5
    assert "\x1b" not in shown[False]


def test_a_record_shows_what_it_has_and_no_more() -> None:
    assert line(StepRecord(step=1, loss=2.0), 5) == "step 1/5  loss 2.0000"
    assert len(facts(FULL, 90)) == 11


def test_sparklines_span_their_values() -> None:
    assert sparkline([]) == ""
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([0.0, 1.0, 0.5])[:2] == "▁█"


def test_meter_reports_model_flops_a_rank_and_shrugs_off_one_slow_step() -> None:
    meter = Meter(tokens=1000, flops_per_token=6e9, ranks=2, peak_tflops=10.0, over=5)
    for seconds in (0.5, 0.5, 9.0, 0.5):
        got = meter.step(seconds)
    assert got == {"seconds": 0.5, "tokens_per_second": 2000.0, "tflops": 6.0, "peak_fraction": 0.6}
    assert Meter(1, 1.0, 1).step(1.0)["peak_fraction"] is None


def test_curves_of_runs_are_drawn_over_each_other(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [tmp_path / name for name in ("a", "b")]
    for k, run in enumerate(runs):
        run.mkdir()
        with RunLog(run, tensorboard=False) as log:
            for step in range(1, 50):
                log.write(StepRecord(step=step, loss=5 / step + k, evaluation=4.0 if step % 10 == 0 else None))
    pictures = [plot(runs[:n], tmp_path / f"{n}.png").read_bytes() for n in (1, 2)]
    assert all(p[:8] == b"\x89PNG\r\n\x1a\n" for p in pictures)
    assert pictures[0] != pictures[1]
    text = plot(runs, tmp_path / "two.svg", ["first", "second"])
    assert text.stat().st_size > 1000
    with pytest.raises(TpcError, match="cannot write"):
        plot(runs, tmp_path / "two.xyz")
    with pytest.raises(TpcError, match="1 labels for 2 runs"):
        plot(runs, tmp_path / "two.png", ["one"])


def captured(module: nn.Module, inputs: dict[str, torch.Tensor], **dynamic: object) -> torch.fx.Graph:
    return torch.export.export(module, (), inputs, strict=False, **dynamic).graph  # type: ignore[arg-type]


CASES = [
    (GPT2, lambda vocab: gpt2_inputs(3, 16, vocab)),
    (Bert, lambda vocab: bert_inputs(3, 16, vocab)),
    (Llama, lambda vocab: gpt2_inputs(3, 16, vocab)),
]


@pytest.mark.parametrize(("model", "make"), CASES, ids=["gpt2", "bert", "llama"])
def test_flops_are_those_that_torch_counts_while_it_runs(model: type[nn.Module], make: object) -> None:
    module = model(vocab=64, positions=32, hidden=16, heads=4, layers=2)
    inputs = make(64)  # type: ignore[operator]
    graph = captured(module, inputs)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = module(**inputs)
    forward = forward_flops(graph)
    assert forward == counter.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(**inputs).backward()
    assert 3 * forward == counter.get_total_flops()
    assert flops_per_token(graph, {}, 48) == 3 * forward / 48
    assert out.dim() == 0


def test_symbolic_sizes_take_the_inputs_values() -> None:
    module = GPT2(vocab=64, positions=32, hidden=16, heads=4, layers=2)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    graph = captured(module, gpt2_inputs(3, 17, 64), dynamic_shapes={"input_ids": free, "labels": free})
    fixed = forward_flops(captured(module, gpt2_inputs(5, 24, 64)))
    assert forward_flops(graph, {"input_ids": (5, 24), "labels": (5, 24)}) == fixed
    with pytest.raises(AssertionError, match="not given"):
        forward_flops(graph)


def test_flops_of_the_paper_come_out() -> None:
    """72·l·s·h²·(1 + s/6h + V/12hl) a sequence without recomputation (arXiv 2104.04473, §5.1, less its 4/3)."""
    hidden, layers, vocab, sequence = 96, 3, 512, 64
    module = GPT2(vocab=vocab, positions=sequence, hidden=hidden, heads=4, layers=layers)
    graph = captured(module, gpt2_inputs(2, sequence, vocab))
    expected = 72 * layers * sequence * hidden**2 * (1 + sequence / (6 * hidden) + vocab / (12 * hidden * layers))
    assert flops_per_token(graph, {}, 2 * sequence) * sequence == pytest.approx(expected, rel=1e-12)


class Contractions(nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,oi->...o", x, w) @ w + torch.addmm(x[0], x[0], w.mT @ w) + (w @ x[0, 0]).sum()


def test_other_products_count_too() -> None:
    x, w = torch.randn(2, 3, 4), torch.randn(5, 4)
    graph = captured(Contractions(), {"x": x, "w": w})
    with FlopCounterMode(display=False) as counter:
        Contractions()(x, w)
    missed = 2 * 5 * 4  # torch does not count the product of a matrix and a vector
    assert forward_flops(graph) == counter.get_total_flops() + missed


def test_peaks_are_known_by_the_devices_name() -> None:
    assert peak_tflops("NVIDIA H200", "bf16") == 989
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp16") == 989
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5
    assert peak_tflops("cpu", "bf16") is None
    assert peak_tflops("NVIDIA H200", "fp64") is None
