"""The threads that compute experts side by side, and the products of matrices without instructions for them."""

import contextlib
import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import fresh_process
import pytest
import torch
from experts_cases import Case, Experts, cases, check_case, inputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_checks import CASE
from paths import TESTS
from routing_cases import GENERATED

from modeling_deepseekmoe import experts_products, experts_workers
from modeling_deepseekmoe.experts import choose_backend, run_experts
from modeling_deepseekmoe.experts_products import Products, has_instructions
from modeling_deepseekmoe.experts_workers import OrderedSum, run_in_workers

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def cpu(instructions: bool) -> Iterator[None]:
    """A CPU that multiplies 16 bits, or one that does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_products, "has_instructions", lambda dtype: instructions or dtype.itemsize > 2)
        patch.setattr(experts_products, "PIECE", 2**11)
        yield


@pytest.fixture(params=[True, False], ids=["instructions", "none"])
def instructions(request: pytest.FixtureRequest) -> Iterator[bool]:
    with cpu(request.param):
        yield request.param


# ------------------------------------------------------------------------------------------------------- the workers
@pytest.mark.parametrize(("items", "threads_of_each"), [(1, 4), (2, 1), (3, 1), (50, 1)])
def test_every_item_once_and_as_many_workers_as_threads(four_threads: None, items: int, threads_of_each: int) -> None:
    seen, workers, together = [], {}, threading.Barrier(min(items, 4))

    def start() -> Callable[[int], None]:
        workers[threading.get_ident()] = (torch.get_num_threads(), torch.is_grad_enabled())
        together.wait(10)  # all of them have begun
        return seen.append

    run_in_workers(range(1, items + 1), start)
    assert sorted(seen) == list(range(1, items + 1))
    assert list(workers.values()) == [(threads_of_each, False)] * min(items, 4)
    assert torch.get_num_threads() == 4 and torch.is_grad_enabled()


def test_no_items() -> None:
    run_in_workers([], lambda: pytest.fail)


@pytest.mark.parametrize("during", [True, False])
def test_new_threads_have_as_many_as_before(during: bool, four_threads: None) -> None:
    found = []

    def look(item: int = 0) -> None:
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()

    run_in_workers(range(8), lambda: look if during else lambda item: None)
    look()
    assert set(found) == {4}


def test_few_items_that_many_threads_divide(four_threads: None) -> None:
    seen = []
    for items in (2, 3):
        run_in_workers(range(items), lambda: lambda item: seen.append(torch.get_num_threads()), divisible=True)
    assert seen == [4, 4, 1, 1, 1]


def test_without_threads_this_one_computes(four_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(cls: type, count: int) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(experts_workers._Pool, "of", classmethod(none))
    seen = []
    run_in_workers(range(5), lambda: seen.append)
    assert seen == [0, 1, 2, 3, 4]


def test_an_error_of_a_worker_is_raised_and_the_rest_is_left(four_threads: None) -> None:
    seen, stopped = [], []

    def compute(item: int) -> None:
        seen.append(item)
        time.sleep(0.002)
        if item == 20:
            raise ZeroDivisionError("of a worker")

    with pytest.raises(ZeroDivisionError, match="of a worker"):
        run_in_workers(range(10_000), lambda: compute, stop=lambda: stopped.append(True))
    after = len(seen)
    assert torch.get_num_threads() == 4 and stopped == [True] and after < 100
    time.sleep(0.05)
    assert len(seen) == after  # nobody computes behind the caller's back


def test_a_forked_process_makes_threads_of_its_own() -> None:
    script = (
        "import os, torch\n"
        "torch.set_num_threads(2)\n"
        "from modeling_deepseekmoe.experts_workers import run_in_workers\n"
        "import threading\n"
        "def run():\n"
        "    done, both = [], threading.Barrier(2)\n"
        "    def start():\n"
        "        both.wait(20)\n"
        "        return done.append\n"
        "    run_in_workers(range(9), start)\n"
        "    return sorted(done) == list(range(9))\n"
        "assert run()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os._exit(0 if run() else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), run())\n"
    )
    assert fresh_process.check("-c", script, cwd=TESTS).stdout.split() == ["0", "True"]


def test_a_sum_does_not_depend_on_who_is_first() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randperm(9, generator=generator)[:4], torch.randn(4, 5, generator=generator)) for _ in range(40)]
    totals = []
    for seed in range(5):
        total = OrderedSum(torch.zeros(9, 5))
        total.ahead = len(parts)  # nobody waits, though the highest may come first
        order = random.Random(seed).sample(range(40), 40)
        shares = [order[thread::3] for thread in range(3)]

        def add(share: list[int], total: OrderedSum = total) -> None:
            for number in share:
                total.add(number, *parts[number])

        threads = [threading.Thread(target=add, args=(share,)) for share in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not total.waiting
        totals.append(total.total)
    expected = torch.zeros(9, 5)
    for places, rows in parts:
        expected.index_add_(0, places, rows)
    assert all(torch.equal(total, expected) for total in totals)


def test_who_is_far_ahead_waits_until_the_slowest_has_added() -> None:
    total = OrderedSum(torch.zeros(1, 1))
    one = (torch.zeros(1, dtype=torch.long), torch.ones(1, 1))
    ahead = threading.Thread(target=lambda: [total.add(number, *one) for number in range(1, total.ahead + 9)])
    ahead.start()
    ahead.join(0.2)
    assert ahead.is_alive() and len(total.waiting) == total.ahead - 1
    total.add(0, *one)
    ahead.join(10)
    assert not ahead.is_alive() and total.total.item() == total.ahead + 9


def test_nobody_waits_for_a_number_that_never_comes(four_threads: None) -> None:
    total = OrderedSum(torch.zeros(1, 1))

    def compute(item: int) -> None:
        if item == 0:
            time.sleep(0.05)
            raise ZeroDivisionError("of the first")
        total.add(item, torch.zeros(1, dtype=torch.long), torch.ones(1, 1))

    with pytest.raises(ZeroDivisionError, match="of the first"):
        run_in_workers(range(1000), lambda: compute, stop=total.close)


@settings(GENERATED, max_examples=60)
@given(case=cases(most_tokens=40))
def test_experts_of_several_threads_equal_the_reference(case: Case) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check_case(case, "loop")
    finally:
        torch.set_num_threads(before)


def test_the_same_bits_with_any_number_of_threads() -> None:
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            inputs = inputs_of(dataclasses.replace(CASE, tokens=50, rank=4), dropout=0.3)
            arguments = (inputs.experts, inputs.hidden, inputs.ids, inputs.weights)
            output = run_experts(*arguments, adapters=inputs.adapters, backend="loop")
            output.backward(inputs.grad)
            runs.append([output, *(tensor.grad for tensor in inputs.differentiable.values())])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_mode(four_threads: None, dtype: torch.dtype) -> None:
    inputs = inputs_of(dataclasses.replace(CASE, tokens=50, dtype=dtype))
    arguments = (inputs.experts, inputs.hidden, inputs.ids, inputs.weights)
    expected = run_experts(*arguments, backend="loop")
    with torch.inference_mode():
        assert torch.equal(run_experts(*arguments, backend="loop"), expected)
        hidden = inputs.hidden + 0
        assert torch.equal(run_experts(inputs.experts, hidden, *arguments[2:], backend="loop"), expected)


@pytest.mark.parametrize("threads", [1, 4])
def test_autocast_has_no_part_in_the_products(threads: int, four_threads: None) -> None:
    torch.set_num_threads(threads)
    seen = []

    def compute(item: int) -> None:
        seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        run_in_workers(range(1, 9), lambda: compute)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [torch.float32] * 8


# ------------------------------------------------------------------------------------------------------ the products
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 5, 33])
def test_products_equal_those_in_float64(dtype: torch.dtype, rows: int, instructions: bool) -> None:
    torch.manual_seed(0)
    products = Products(dtype)
    assert products.widens == (dtype in LOW and not instructions)
    matrix = (torch.randn(70, 50) / 7).to(dtype)
    left, right = (torch.randn(rows, width).to(dtype).to(products.computes_in) for width in (70, 50))
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]

    def close(found: torch.Tensor, expected: torch.Tensor) -> None:
        assert (found.double() - expected).norm() <= tolerance * expected.norm()

    close(products.linear(right, matrix), right.double() @ matrix.double().t())
    close(products.linear_backward(left, matrix), left.double() @ matrix.double())
    out = torch.full((70, 50), torch.nan, dtype=dtype)
    expected = left.double().t() @ right.double()
    products.outer(left, right, out, add=False)
    close(out, expected)
    products.outer(left, right, out, add=True)
    close(out, 2 * expected)


@settings(GENERATED, max_examples=200)
@given(case=cases(most_tokens=40, dtypes=(*LOW, torch.float32)), instructions=st.booleans())
def test_experts_in_16_bits_equal_the_reference(case: Case, instructions: bool) -> None:
    with cpu(instructions):
        check_case(case, "loop")


def test_the_same_output_with_and_without_a_backward_pass(instructions: bool) -> None:
    inputs = inputs_of(dataclasses.replace(CASE, tokens=30, dtype=torch.bfloat16))
    arguments = (inputs.experts, inputs.hidden, inputs.ids, inputs.weights)
    with torch.no_grad():
        expected = run_experts(*arguments, backend="loop")
    assert torch.equal(run_experts(*arguments, backend="loop"), expected)


def test_who_has_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    x86, arm = {"architecture": "x86_64"}, {"architecture": "aarch64"}
    for found, expected in (
        ({**x86, "avx512_f": True}, ()),
        ({**x86, "avx512_bf16": True, "amx_bf16": False}, (torch.bfloat16,)),
        ({**x86, "amx_bf16": True, "avx512_fp16": True}, LOW),
        ({**arm, "fp16_arith": True, "bf16": False}, (torch.float16,)),
        ({**arm, "bf16": True}, (torch.bfloat16,)),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        has_instructions.cache_clear()
        assert tuple(dtype for dtype in LOW if has_instructions(dtype)) == expected
        assert has_instructions(torch.float32) and has_instructions(torch.float64)
    has_instructions.cache_clear()


def test_the_backend_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Experts(SimpleNamespace(), 8, 16, 4).to(torch.bfloat16).eval()
    many, few = torch.empty(20, 16), torch.empty(19, 16)
    for has, small in itertools.product((True, False), (True, False)):
        monkeypatch.setattr("modeling_deepseekmoe.experts.has_instructions", lambda dtype, has=has: has)
        monkeypatch.setattr("modeling_deepseekmoe.experts.LOOP_FROM", 2**18 if small else 0)
        for hidden, grad in itertools.product((many, few), (True, False)):
            with torch.set_grad_enabled(grad):
                backend, reason = choose_backend(module, hidden, top_k=2)
            expected = "grouped" if (has and small) or (hidden is few and not grad) else "loop"
            assert (backend, bool(reason)) == (expected, expected == "grouped")


def test_adapters_of_few_tokens_need_no_backend_by_name() -> None:
    case = dataclasses.replace(CASE, tokens=1, dtype=torch.bfloat16, rank=4, hidden=1024, width=512)
    inputs = inputs_of(case)
    inputs.experts.eval()
    with torch.no_grad():
        given = inputs.experts, inputs.hidden, inputs.ids, inputs.weights
        found, expected = (run_experts(*given, adapters=inputs.adapters, backend=name) for name in (None, "loop"))
    assert torch.equal(found, expected)
