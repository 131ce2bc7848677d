"""Predicts the seconds of one kernel, by the roofline model, and of one collective, as α + bytes / β."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import fx

from tpcompiler import runtime
from tpcompiler.cost.rank_sizes import RankSizes
from tpcompiler.cost.work import Kernel
from tpcompiler.graphs import tensors
from tpcompiler.ops.operands import tensor_operands
from tpcompiler.ops.product_flops import product_flops
from tpcompiler.spec.machine import Hardware

Recompute = Literal["none", "attention", "layer"]  # what is recomputed, as in `train.activation_checkpointing`
ATTENTION_BACKWARD = 2.5  # products in backward per product in forward of fused attention: five for two
LOSS_FORWARD, LOSS_BACKWARD = 24, 18  # bytes of memory traffic per logit: to float32, passes of log-softmax, and back


@dataclass(frozen=True)
class Price:
    """Seconds and FLOPs of a kernel."""

    forward: float
    backward: float = 0.0
    weights: float = 0.0  # the part of `backward` that computes the gradients of weights
    flops: float = 0.0  # of forward; for causal attention without regard to the mask


@dataclass(frozen=True)
class Rates:
    """A machine's speeds, for numbers of `width` bytes."""

    machine: Hardware
    sizes: RankSizes
    width: int = 2

    def price(self, kernel: Kernel) -> Price:
        if kernel.kind == "product":
            return self._product(kernel)
        if kernel.kind == "head":
            return self._head(kernel)
        if kernel.kind == "attention":
            return self._attention(kernel)
        if kernel.kind == "loss":
            logits = self.sizes.elements(kernel.reads[0])
            return Price(self.moving(LOSS_FORWARD * logits), self.moving(LOSS_BACKWARD * logits))
        if kernel.kind == "lookup":
            rows, table = self.sizes.elements(kernel.node), self.sizes.elements(kernel.reads[0])
            return Price(self.moving(2 * self.width * rows), self.moving(self.width * (table + 2 * rows)))
        return self._fused(kernel)

    def bytes(self, nodes: tuple[fx.Node, ...]) -> int:
        return sum(self.sizes.elements(n) * self.item(n) for n in nodes)

    def item(self, node: fx.Node) -> int:
        """Bytes per number of a value. Floating-point values are computed in the run's precision."""
        value = tensors(node.meta["val"])[0]
        return self.width if value.is_floating_point() else value.dtype.itemsize

    def moving(self, number: float) -> float:
        """Seconds of a kernel that moves `number` bytes to or from memory."""
        m = self.machine
        return number / (m.bandwidth_gbps * 1e9 * m.bandwidth_efficiency) + m.kernel_us * 1e-6

    def multiplying(self, flops: float, shortest: float, number: float) -> float:
        """Seconds of a matrix product of `flops`, whose shortest side is `shortest` and which moves `number` bytes."""
        m = self.machine
        rate = m.peak_tflops * 1e12 * m.efficiency * shortest / (shortest + m.narrow)
        if self.width == 4:
            rate /= 8  # TF32 is off, so that 32-bit products run on other units, at an eighth of the rate or less
        return max(flops / rate + m.kernel_us * 1e-6, self.moving(number))

    def _product(self, kernel: Kernel) -> Price:
        node = kernel.node
        out, flops, operands = self.sizes.elements(node), 0.0, []
        if node.target is runtime.entered_linear:
            x, *weights = (n for n in node.all_input_nodes if len(tensors(n.meta["val"])[0].shape) > 1)
            width = self.sizes.shapes(x)[0][-1]
            flops, operands = 2.0 * width * out, [self.sizes.elements(x), sum(map(self.sizes.elements, weights))]
        else:
            flops = float(product_flops(node, self.sizes.shapes))
            known = [n for n in tensor_operands(node) if n is not None]
            operands = sorted((self.sizes.elements(n) for n in known), reverse=True)[:2]
        if not flops:
            return self._fused(kernel)
        elements = [*operands, out]
        shortest = flops / 2 / max(elements)
        one = self.multiplying(flops, shortest, self.width * sum(elements))
        matrices = [n for n in kernel.wanted if len(tensors(n.meta["val"])[0].shape) > 1]
        trained = sum(n.op == "placeholder" for n in matrices)
        return Price(one, one * min(len(matrices), 2), one * min(trained, 1), flops)

    def logits(self, head: fx.Node) -> float:
        """How many logits a rank's output layer makes, that is joined with its loss."""
        x, weight = (self.sizes.shapes(n)[0] for n in head.all_input_nodes[:2])
        return prod(x[:-1]) * weight[0]

    def _head(self, kernel: Kernel) -> Price:
        """A product, its two gradients, and each logit read once for its sums and once to become its gradient."""
        x, weight = kernel.node.all_input_nodes[:2]
        logits, flops = self.logits(kernel.node), 2.0 * self.logits(kernel.node) * self.sizes.shapes(x)[0][-1]
        elements = [self.sizes.elements(x), self.sizes.elements(weight), logits]
        one = self.multiplying(flops, flops / 2 / max(elements), self.width * sum(elements))
        trained = 2 if kernel.wanted else 0
        again = self.moving(self.width * logits * (3 if trained else 1))
        return Price(one + again, one * trained, one if trained else 0.0, flops)

    def _attention(self, kernel: Kernel) -> Price:
        m, flops = self.machine, float(product_flops(kernel.node, self.sizes.shapes))
        causal = "is_causal" in kernel.node.kwargs or True in kernel.node.args[3:]
        rate = m.peak_tflops * 1e12 * m.attention_efficiency / (8 if self.width == 4 else 1)
        seconds = flops * (0.5 if causal else 1.0) / rate + m.kernel_us * 1e-6
        return Price(seconds, seconds * ATTENTION_BACKWARD if kernel.wanted else 0.0, 0.0, flops)

    def _fused(self, kernel: Kernel) -> Price:
        """A fused kernel. Its backward reads what forward read and the gradients of what forward wrote. It writes the
        gradients of what forward read."""
        reads, writes = self.bytes(kernel.reads), self.bytes(kernel.writes)
        back = reads + writes + self.bytes(kernel.wanted)
        return Price(self.moving(reads + writes), self.moving(back) if kernel.wanted else 0.0)

    # -- between ranks ----------------------------------------------------------------------------------------------

    def collective(self, kind: str, number: float, degree: int, stride: int) -> float:
        """Seconds of a collective of `degree` ranks, `stride` devices apart, on a value of `number` bytes in all.

        A group over several hosts can use as many of a host's links as it has devices in that host.
        """
        if degree == 1:
            return 0.0
        m = self.machine
        alpha, beta = m.alpha_us, m.beta_gbps
        if degree * stride > m.host:
            alpha = m.between_alpha_us
            beta = min(beta, m.between_beta_gbps * max(1, m.host // stride))
        passes = 2 if kind == "all_reduce" else 1
        return alpha * 1e-6 + passes * (degree - 1) / degree * number / (beta * 1e9)
