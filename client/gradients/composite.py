"""GRU, LSTM and multi-head attention for the book-keeping engine.

torch runs each of these as one call whose inner products cannot be recorded. While the engine records, their
forward is this module's: the same mathematics from products that are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from gapweave.client.gradients.layers import Part, Patients, Use, matrix, sequences
from gapweave.shared.errors import UsageError


class Tape(Protocol):
    """Where uses of products are recorded."""

    def product(self, key: Product, inputs: Tensor) -> Tensor:
        """W x + b, recorded."""
        ...

    def past(self, key: Product, inputs: Tensor, gradients: Tensor) -> None:
        """A use whose output gradient is known already."""
        ...


class Product:
    """One matrix (or a slice of a packed one) with its bias, inside a composite layer.

    Args:
        weight: [p, d] or more rows, of which `rows` are meant.
        bias: [p], or None.
        rows: slice of the rows; None for all.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: slice | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.rows = rows or slice(0, len(weight))

    def __call__(self, inputs: Tensor) -> Tensor:
        """Apply it."""
        return functional.linear(inputs, self.weight[self.rows], None if self.bias is None else self.bias[self.rows])

    def part(self, uses: Sequence[Use], patients: Patients) -> Part:
        """Its share of the per-patient gradients, in the packed parameters' shapes."""
        inputs, gradients = sequences(uses, patients)
        weight, bias = self.weight[self.rows], None if self.bias is None else self.bias[self.rows]
        inner = matrix(weight, bias, inputs, gradients)

        def weighted(factor: Tensor, keep: Tensor | None) -> dict[Tensor, Tensor]:
            found = inner.weighted(factor, keep)
            whole = {self.weight: self._unpack(self.weight, found[weight])}
            if self.bias is not None and bias is not None:
                whole[self.bias] = self._unpack(self.bias, found[bias])
            return whole

        return Part(squares=inner.squares, scale=inner.scale, weighted=weighted)

    def _unpack(self, whole: Tensor, part: Tensor) -> Tensor:
        result = torch.zeros_like(whole)
        result[self.rows] = part
        return result


class _Scan(torch.autograd.Function):
    """A recurrence in one node of the graph: its backward records the products with the previous state."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, start: Tensor, cell: Any, key: Product, tape: Tape) -> Tensor:
        states, saved = cell.run(gates, start, key)
        ctx.states, ctx.saved, ctx.cell, ctx.key, ctx.tape = states, saved, cell, key, tape
        outputs: Tensor = states[1:].transpose(0, 1)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        into_gates, into_products = ctx.cell.back(gradients[0], ctx.states, ctx.saved, ctx.key)
        ctx.tape.past(ctx.key, ctx.states[:-1].transpose(0, 1), into_products.transpose(0, 1))
        return into_gates.transpose(0, 1), None, None, None, None


class GruCell:
    """h' = (1 - z) n + z h with n = tanh(x_n + r (W h + b)_n) (torch.nn.GRU)."""

    @staticmethod
    def run(gates: Tensor, start: Tensor, key: Product) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """[R, T, 3H] input products to states [T + 1, R, H] and what the backward needs."""
        size = start.shape[1]
        saved: list[tuple[Tensor, ...]] = []
        states = start.new_empty(gates.shape[1] + 1, *start.shape)
        states[0] = start
        for at, step in enumerate(gates.transpose(0, 1).contiguous()):
            product = key(states[at])
            both = torch.sigmoid(step[:, : 2 * size] + product[:, : 2 * size])
            inner = product[:, 2 * size :]
            new = torch.tanh(torch.addcmul(step[:, 2 * size :], both[:, :size], inner))
            torch.lerp(new, states[at], both[:, size:], out=states[at + 1])
            saved.append((both, inner, new))
        return states, saved

    @staticmethod
    def back(outer: Tensor, states: Tensor, saved: list[tuple[Tensor, ...]], key: Product) -> tuple[Tensor, Tensor]:
        """Gradients in the input products and in the state products, [T, R, 3H] each."""
        size, weight = outer.shape[2], key.weight[key.rows]
        into_gates = outer.new_empty(len(saved), len(outer), 3 * size)
        into_products = torch.empty_like(into_gates)
        carried = torch.zeros_like(outer[:, 0])
        for at in range(len(saved) - 1, -1, -1):
            both, inner, new = saved[at]
            reset, update = both[:, :size], both[:, size:]
            total = outer[:, at] + carried
            gate, product = into_gates[at], into_products[at]
            candidate = total * (1 - update) * (1 - new * new)
            gate[:, 2 * size :] = candidate
            gate[:, :size] = candidate * inner
            gate[:, size : 2 * size] = total * (states[at] - new)
            gate[:, : 2 * size] *= both * (1 - both)
            product[:, : 2 * size] = gate[:, : 2 * size]
            product[:, 2 * size :] = candidate * reset
            carried = torch.addmm(total * update, product, weight)
        return into_gates, into_products


class LstmCell:
    """c' = f c + i g, h' = o tanh(c') (torch.nn.LSTM); states carry h, and c is kept beside."""

    @staticmethod
    def run(gates: Tensor, start: Tensor, key: Product) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """[R, T, 4H] input products to states [T + 1, R, H] and what the backward needs."""
        cell = torch.zeros_like(start)
        saved: list[tuple[Tensor, ...]] = []
        states = start.new_empty(gates.shape[1] + 1, *start.shape)
        states[0] = start
        for at, step in enumerate(gates.transpose(0, 1).contiguous()):
            enter, forget, inner, leave = (step + key(states[at])).chunk(4, 1)
            enter, forget, leave = torch.sigmoid(enter), torch.sigmoid(forget), torch.sigmoid(leave)
            inner = torch.tanh(inner)
            before, cell = cell, forget * cell + enter * inner
            squashed = torch.tanh(cell)
            torch.mul(leave, squashed, out=states[at + 1])
            saved.append((enter, forget, inner, leave, before, squashed))
        return states, saved

    @staticmethod
    def back(outer: Tensor, states: Tensor, saved: list[tuple[Tensor, ...]], key: Product) -> tuple[Tensor, Tensor]:
        """Gradients in both kinds of products, which are equal, [T, R, 4H]."""
        weight = key.weight[key.rows]
        found = outer.new_empty(len(saved), len(outer), 4 * outer.shape[2])
        carried = torch.zeros_like(outer[:, 0])
        of_cell = torch.zeros_like(carried)
        for at in range(len(saved) - 1, -1, -1):
            enter, forget, inner, leave, before, squashed = saved[at]
            total = outer[:, at] + carried
            of_cell = of_cell + total * leave * (1 - squashed * squashed)
            raw = [
                of_cell * inner * enter * (1 - enter),
                of_cell * before * forget * (1 - forget),
                of_cell * enter * (1 - inner * inner),
                total * squashed * leave * (1 - leave),
            ]
            torch.cat(raw, 1, out=found[at])
            carried = found[at] @ weight
            of_cell = of_cell * forget
        return found, found


def recurrent(cell: Any) -> Callable[..., Any]:
    """The recording forward of nn.GRU or nn.LSTM: any layers, both directions, initial state zero."""

    def forward(layer: Any, tape: Tape, products: dict[str, Product], inputs: Tensor, state: Any = None) -> Any:
        if state is not None:
            raise _refused(layer, "is given an initial state")
        last, current = [], inputs
        for depth in range(layer.num_layers):
            outputs = []
            for reverse in ("", "_reverse") if layer.bidirectional else ("",):
                suffix = f"l{depth}{reverse}"
                given = current.flip(1) if reverse else current
                gates = tape.product(products[f"ih_{suffix}"], given)
                start = torch.zeros(len(inputs), layer.hidden_size, dtype=inputs.dtype, device=inputs.device)
                states = _Scan.apply(gates, start, cell, products[f"hh_{suffix}"], tape)
                last.append(states[:, -1])
                outputs.append(states.flip(1) if reverse else states)
            current = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
        final = torch.stack(last)
        # An LSTM's cell state is not differentiated through here: nobody may read it.
        return current, (final, None) if cell is LstmCell else final

    return forward


def recurrent_products(layer: Any) -> dict[str, Product]:
    """The products inside nn.GRU or nn.LSTM.

    Raises:
        UsageError: for settings whose gradients are not known here.
    """
    if not layer.batch_first or layer.dropout or layer.proj_size:
        raise _refused(layer, "needs batch_first=True, and neither dropout nor projections")
    result = {}
    for depth in range(layer.num_layers):
        for reverse in ("", "_reverse") if layer.bidirectional else ("",):
            for kind in ("ih", "hh"):
                suffix = f"{kind}_l{depth}{reverse}"
                bias = getattr(layer, f"bias_{suffix}") if layer.bias else None
                result[suffix] = Product(getattr(layer, f"weight_{suffix}"), bias)
    return result


def attention(
    layer: nn.MultiheadAttention,
    tape: Tape,
    products: dict[str, Product],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recording forward of nn.MultiheadAttention."""
    heads = [tape.product(products[name], given) for name, given in (("q", query), ("k", key), ("v", value))]
    q, k, v = (part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for part in heads)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    for mask, shape in ((attn_mask, None), (key_padding_mask, (len(query), 1, 1, -1))):
        if mask is not None:
            mask = mask if shape is None else mask.view(*shape)
            scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1)
    joined = (weights @ v).transpose(1, 2).flatten(2)
    output = tape.product(products["out"], joined)
    if not need_weights:
        return output, None
    return output, weights.mean(1) if average_attn_weights else weights


def attention_products(layer: nn.MultiheadAttention) -> dict[str, Product]:
    """The products inside nn.MultiheadAttention.

    Raises:
        UsageError: for settings whose gradients are not known here.
    """
    if not layer.batch_first or layer.dropout or layer.bias_k is not None or layer.add_zero_attn:
        raise _refused(layer, "needs batch_first=True, and neither dropout, bias_kv nor zero attention")
    out = Product(layer.out_proj.weight, layer.out_proj.bias)
    if layer.in_proj_weight is None:
        raise _refused(layer, "has keys or values of another width")
    width = layer.embed_dim
    packed = {
        name: Product(layer.in_proj_weight, layer.in_proj_bias, slice(at * width, (at + 1) * width))
        for at, name in enumerate("qkv")
    }
    return {**packed, "out": out}


def _refused(layer: nn.Module, why: str) -> UsageError:
    return UsageError(
        f"{type(layer).__name__} {why}", where="study:model", remedy="Change it, or set privacy.engine: opacus"
    )


COMPOSITES: dict[type[nn.Module], tuple[Callable[[Any], dict[str, Product]], Callable[..., Any]]] = {
    nn.GRU: (recurrent_products, recurrent(GruCell)),
    nn.LSTM: (recurrent_products, recurrent(LstmCell)),
    nn.MultiheadAttention: (attention_products, attention),
}
"""Layer type -> (its products, its recording forward)."""
