"""Loops over updates as machine code, for what numpy would pass over memory many times for.

A loop is written with llvmlite's builder and compiled in memory for the processor at hand (decision 0023). Numbers are
float32 as updates come, in vectors of `LANES`; places in an array are counted in numbers, not in bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir

LANES = 8
"""Numbers of a vector; a processor with other registers takes two for one, or one for two."""

FLOAT, INTEGER = ir.FloatType(), ir.IntType(64)
FLOATS, DOUBLES = ir.VectorType(FLOAT, LANES), ir.VectorType(ir.DoubleType(), LANES)
_BYTE, _WORD = ir.IntType(8), ir.IntType(32)

Value = Any
"""A value of the code being built; llvmlite has no types."""


class Code:
    """One function, without result, being built.

    Args:
        arguments: what it is called with: arrays by a pointer to `FLOAT` or `INTEGER`, or an `INTEGER`.

    Attributes:
        arguments: their values.
        builder: llvmlite's, for arithmetic.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        self._types = arguments
        self._function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), arguments), "loop")
        self.arguments: tuple[Value, ...] = tuple(self._function.args)
        fetch = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _WORD, _WORD, _WORD])
        self._fetch = ir.Function(self._function.module, fetch, "llvm.prefetch.p0i8")
        self.builder: Any = ir.IRBuilder(self._function.append_basic_block())

    @contextmanager
    def repeat(self, count: Value, step: int = 1) -> Iterator[Value]:
        """Build what is inside for 0, step, 2 step, ... below `count`, and give that number."""
        builder = self.builder
        head, body, after = (self._function.append_basic_block() for _ in range(3))
        before = builder.block
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(INTEGER)
        index.add_incoming(number(0), before)
        builder.cbranch(builder.icmp_signed("<", index, count), body, after)
        builder.position_at_end(body)
        yield index
        index.add_incoming(builder.add(index, number(step)), builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    def variable(self, kind: Any) -> Value:
        """Room for a value that changes; it becomes a register, since it belongs to the first block."""
        with self.builder.goto_entry_block():
            return self.builder.alloca(kind)

    def place(self, row: Value, stride: Value, column: Value) -> Value:
        """Where a column of a row is."""
        return self.builder.add(self.builder.mul(row, stride), column)

    def element(self, array: Value, at: Value) -> Value:
        """One number of an array."""
        return self.builder.load(self.builder.gep(array, [at]))

    def load(self, array: Value, at: Value) -> Value:
        """A vector, from any place."""
        return self.builder.load(self._vector(array, at), align=4)

    def store(self, value: Value, array: Value, at: Value) -> None:
        """A vector, to any place."""
        self.builder.store(value, self._vector(array, at), align=4)

    def fetch(self, array: Value, at: Value) -> None:
        """Have a place brought to the caches, for later; one outside the array does no harm."""
        address = self.builder.bitcast(self.builder.gep(array, [at]), _BYTE.as_pointer())
        self.builder.call(self._fetch, [address, *(ir.Constant(_WORD, flag) for flag in (0, 3, 1))])  # read, keep, data

    def _vector(self, array: Value, at: Value) -> Value:
        return self.builder.bitcast(self.builder.gep(array, [at]), FLOATS.as_pointer())

    def compiled(self) -> Callable[..., None]:
        """The function, to be called with addresses and numbers."""
        self.builder.ret_void()
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
        )
        module = binding.parse_assembly(str(self._function.module))
        passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(module, passes)
        engine = binding.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        kinds = [ctypes.c_int64 if kind is INTEGER else ctypes.c_void_p for kind in self._types]
        function = ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address("loop"))

        def call(*arguments: int) -> None:
            assert engine  # the code goes when its engine does
            function(*arguments)

        return call


def number(value: int) -> Value:
    """A constant."""
    return ir.Constant(INTEGER, value)


def same(value: float, kind: Any) -> Value:
    """A constant vector."""
    return ir.Constant(kind, [value] * LANES)
