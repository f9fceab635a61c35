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

from gapweave.client.gradients.layers import Part, Use, matrix, sequences
from gapweave.client.gradients.padding import aligned
from gapweave.client.gradients.patients import Patients
from gapweave.shared.errors import UsageError


class Tape(Protocol):
    """Where uses of products are recorded."""

    anchor: Tensor
    """What every backward reaches."""

    def product(self, key: Product, inputs: Tensor) -> Tensor:
        """W x + b, recorded."""
        ...

    def past(self, key: Product, inputs: Tensor, gradients: Tensor) -> None:
        """A use whose output gradient is known already."""
        ...


class Product:
    """One matrix with its bias, inside a composite layer.

    Args:
        weight: [p, d].
        bias: [p], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, inputs: Tensor) -> Tensor:
        """Apply it."""
        return aligned(inputs, self.weight, self.bias)

    def part(self, uses: Sequence[Use], patients: Patients) -> Part:
        """Its share of the per-patient gradients."""
        return matrix(self.weight, self.bias, *sequences(uses, patients), patients.most)


class _Scan(torch.autograd.Function):
    """A recurrence in one node of the graph: its backward records the products with the inputs and the states.

    Time comes first inside, so that each step is one block of memory. The tape's anchor is an input, so that there
    is a backward when the other inputs need none.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, anchor: Tensor, cell: Any, keys: tuple[Product, Product], tape: Tape) -> Any:
        steps = inputs.transpose(0, 1).contiguous()
        states, saved = cell.run(keys[0](steps), keys[1])
        ctx.save_for_backward(steps, states, *saved)
        ctx.cell, ctx.keys, ctx.tape = cell, keys, tape
        return states[1:].transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        steps, states, *saved = ctx.saved_tensors
        of_inputs, of_states = ctx.keys
        into_gates, into_products = ctx.cell.back(gradients[0].transpose(0, 1), states, saved, of_states.weight)
        ctx.tape.past(of_inputs, steps.transpose(0, 1), into_gates.transpose(0, 1))
        ctx.tape.past(of_states, states[:-1].transpose(0, 1), into_products.transpose(0, 1))
        into_inputs = (into_gates @ of_inputs.weight).transpose(0, 1) if ctx.needs_input_grad[0] else None
        return into_inputs, None, None, None, None


class GruCell:
    """h' = (1 - z) n + z h with n = tanh(x_n + r (W h + b)_n) (torch.nn.GRU)."""

    @staticmethod
    def run(gates: Tensor, key: Product) -> tuple[Tensor, list[Tensor]]:
        """[T, R, 3H] input products, overwritten, to states [T + 1, R, H] and what the backward needs."""
        size = gates.shape[2] // 3
        states = gates.new_zeros(len(gates) + 1, gates.shape[1], size)
        inner = gates.new_empty(len(gates), gates.shape[1], size)
        for before, gate, kept, after in zip(states, gates, inner, states[1:], strict=False):
            product = key(before)
            both, new = gate.split((2 * size, size), 1)
            both.add_(product[:, : 2 * size]).sigmoid_()
            kept.copy_(product[:, 2 * size :])
            new.addcmul_(both[:, :size], kept).tanh_()
            torch.lerp(new, before, both[:, size:], out=after)
        return states, [gates, inner]

    @staticmethod
    def back(outer: Tensor, states: Tensor, saved: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in the input products and in the state products, [T, R, 3H] each.

        The former take the place of what was saved, which nobody reads again: fresh memory is slow.
        """
        size = outer.shape[2]
        gates, inner = saved
        into_products, found = torch.empty_like(gates), torch.empty_like(gates[0])
        of_reset, of_update, of_new = found.split(size, 1)
        carried = torch.zeros_like(outer[0])
        for at in range(len(outer) - 1, -1, -1):
            reset, update, new = gates[at].split(size, 1)
            total = carried.add_(outer[at])
            carried = total * update
            _through_tanh(torch.sub(total, carried, out=of_new), new)
            torch.mul(of_new, inner[at], out=of_reset)
            torch.sub(states[at], new, out=of_update).mul_(total)
            _through_sigmoid(found[:, : 2 * size], gates[at, :, : 2 * size])
            product = into_products[at].copy_(found)
            product[:, 2 * size :].mul_(reset)
            carried.addmm_(product, weight)
            gates[at] = found
        return gates, into_products


def _through_sigmoid(gradient: Tensor, output: Tensor) -> None:
    """Gradient in a sigmoid's output to that in its input, in place."""
    torch.ops.aten.sigmoid_backward(gradient, output, grad_input=gradient)


def _through_tanh(gradient: Tensor, output: Tensor) -> None:
    """The same for tanh."""
    torch.ops.aten.tanh_backward(gradient, output, grad_input=gradient)


class LstmCell:
    """c' = f c + i g, h' = o tanh(c') (torch.nn.LSTM); states carry h, and c is kept beside."""

    @staticmethod
    def run(gates: Tensor, key: Product) -> tuple[Tensor, list[Tensor]]:
        """[T, R, 4H] input products, overwritten, to states [T + 1, R, H] and what the backward needs."""
        size = gates.shape[2] // 4
        states = gates.new_zeros(len(gates) + 1, gates.shape[1], size)
        cells = torch.zeros_like(states)
        squashed = torch.empty_like(states[1:])
        for at, gate in enumerate(gates):
            gate.add_(key(states[at]))
            enter, forget, inner, leave = gate.split(size, 1)
            gate[:, : 2 * size].sigmoid_()
            torch.mul(enter, inner.tanh_(), out=cells[at + 1]).addcmul_(forget, cells[at])
            torch.tanh(cells[at + 1], out=squashed[at])
            torch.mul(leave.sigmoid_(), squashed[at], out=states[at + 1])
        return states, [gates, cells, squashed]

    @staticmethod
    def back(outer: Tensor, states: Tensor, saved: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in both kinds of products, which are equal, [T, R, 4H], in the place of what was saved."""
        gates, cells, squashed = saved
        size, found = outer.shape[2], torch.empty_like(gates[0])
        of_enter, of_forget, of_inner, of_leave = found.split(size, 1)
        carried, of_cell = torch.zeros_like(outer[0]), torch.zeros_like(outer[0])
        for at in range(len(outer) - 1, -1, -1):
            enter, forget, inner, leave = gates[at].split(size, 1)
            total = carried.add_(outer[at])
            squeezed = total * leave
            _through_tanh(squeezed, squashed[at])
            of_cell.add_(squeezed)
            torch.mul(of_cell, inner, out=of_enter)
            torch.mul(of_cell, cells[at], out=of_forget)
            torch.mul(of_cell, enter, out=of_inner)
            torch.mul(total, squashed[at], out=of_leave)
            _through_sigmoid(found[:, : 2 * size], gates[at, :, : 2 * size])
            _through_tanh(of_inner, inner)
            _through_sigmoid(of_leave, leave)
            torch.mm(found, weight, out=carried)
            of_cell.mul_(forget)
            gates[at] = found
        return gates, gates


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
                keys = products[f"ih_{suffix}"], products[f"hh_{suffix}"]
                states = _Scan.apply(given, tape.anchor, cell, keys, tape)
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
    projected = _projected(tape, products["in"], query, key, value)
    q, k, v = (part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for part in projected)
    mask = _additive(attn_mask, key_padding_mask, query)
    if not need_weights:
        joined = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return tape.product(products["out"], joined.transpose(1, 2).flatten(2)), None
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    output = tape.product(products["out"], (weights @ v).transpose(1, 2).flatten(2))
    return output, weights.mean(1) if average_attn_weights else weights


def _projected(tape: Tape, key: Product, *inputs: Tensor) -> list[Tensor]:
    """Queries, keys and values: each use of the packed matrix is recorded whole, so that its norm is exact."""
    width = len(key.weight) // 3
    if inputs[0] is inputs[1] is inputs[2]:
        return list(tape.product(key, inputs[0]).split(width, 2))
    return [tape.product(key, given).split(width, 2)[at] for at, given in enumerate(inputs)]


def _additive(attn_mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores."""
    total: Tensor | None = None
    for mask in (attn_mask, None if padding is None else padding.view(len(padding), 1, 1, -1)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -math.inf)
        total = mask if total is None else total + mask
    return total


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
    return {"in": Product(layer.in_proj_weight, layer.in_proj_bias), "out": out}


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
