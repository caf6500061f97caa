"""`with patched(...)`: what a network has inside a block and after it, in any order and from several threads."""

import asyncio
import copy
import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from atc_diffusion import ATCConfig, MergeConfig, ToMeConfig, ViTConfig, apply_patch, patched, remove_patch, summary
from atc_diffusion.testing import UNET
from tests.helpers.unet import run

CONDITION: dict[str, Any] = {"conditioning_embedding_out_channels": (4, 8)}


def config_of(model: Any) -> Any:
    """The present configuration; None without a patch."""
    try:
        return summary(model).config
    except ValueError:
        return None


def test_patched_restores_what_was_there_also_after_an_exception(unet):
    before = run(unet)
    with patched(unet, r=0.5) as same:
        assert same is unet
        assert not torch.equal(run(unet), before)
    assert torch.equal(run(unet), before)
    apply_patch(unet, r=0.8)
    with pytest.raises(RuntimeError, match="boom"), patched(unet, ToMeConfig()):
        raise RuntimeError("boom")
    assert summary(unet).config == ATCConfig(r=0.8)


def test_patched_restores_what_each_network_had(unet):
    pipe = SimpleNamespace(unet=unet, controlnet=ControlNetModel.from_unet(unet, **CONDITION))
    apply_patch(pipe.unet, r=0.5)
    with patched(pipe, r=0.8):
        assert {layer.network for layer in summary(pipe).layers} == {"unet", "controlnet"}
    assert summary(unet).config == ATCConfig(r=0.5)
    with pytest.raises(ValueError, match="is not patched"):
        summary(pipe.controlnet)
    apply_patch(pipe.controlnet, r=0.7)
    with patched(pipe, r=0.8):
        pass
    assert [summary(network).config for network in (pipe.unet, pipe.controlnet)] == [
        ATCConfig(r=0.5),
        ATCConfig(r=0.7),
    ]


def in_thread(function: Callable[[], Any]) -> Any:
    """The result of `function` in another thread, or its exception."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.integers(1, 9)),
        st.tuples(st.just("apply"), st.integers(1, 9)),
        st.tuples(st.just("leave"), st.integers(0, 9)),
        st.tuples(st.just("remove"), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(OPERATIONS)
def test_blocks_may_end_in_any_order(operations):
    """Each block has a patch of its own; the network has that of the last open one."""
    unet = UNet2DConditionModel(**UNET)
    blocks: list[AbstractContextManager[Any]] = []
    expected: list[ATCConfig | None] = [None]  # what is there outside of all blocks, and in each open one
    for operation, number in operations:
        config = ATCConfig(r=number / 10) if number else None
        if operation == "enter":
            blocks.append(patched(unet, config))
            blocks[-1].__enter__()
            expected.append(config)
        elif operation == "apply":
            apply_patch(unet, config)
            expected[-1] = config
        elif operation == "remove":
            remove_patch(unet)
            expected[-1] = None
        elif blocks:
            position = number % len(blocks)
            blocks.pop(position).__exit__(None, None, None)
            del expected[position + 1]
        assert config_of(unet) == expected[-1]
    for block in reversed(blocks):
        block.__exit__(None, None, None)
    assert config_of(unet) == expected[0]
    remove_patch(unet)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())


def test_a_generator_that_is_closed_or_forgotten_ends_its_block(unet):
    def draw(config: MergeConfig) -> Iterator[Any]:
        with patched(unet, config):
            while True:
                yield config_of(unet)

    first, second = draw(ATCConfig(r=0.5)), draw(ATCConfig(r=0.25))
    assert [next(first), next(second)] == [ATCConfig(r=0.5), ATCConfig(r=0.25)]
    first.close()  # type: ignore[attr-defined]
    assert next(second) == ATCConfig(r=0.25)
    del second
    assert config_of(unet) is None


def test_blocks_on_a_pipeline_and_on_a_part_of_it_end_in_any_order(unet):
    pipe = SimpleNamespace(unet=unet, controlnet=ControlNetModel.from_unet(unet, **CONDITION))
    outer, inner = patched(pipe, r=0.5), patched(unet, r=0.25)
    with ExitStack() as stack:
        stack.enter_context(inner)
        outer.__enter__()
        stack.pop_all().close()
        assert (config_of(unet), config_of(pipe.controlnet)) == (ATCConfig(r=0.5), ATCConfig(r=0.5))
    outer.__exit__(None, None, None)
    assert (config_of(unet), config_of(pipe.controlnet)) == (None, None)


REFUSED = r"'.*' is inside `with patched\(...\)` on this UNet2DConditionModel, .*; wait until that block ends"


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: patched(unet, ATCConfig(r=0.25)).__enter__(),
        lambda unet: patched(SimpleNamespace(unet=unet), ToMeConfig()).__enter__(),
        lambda unet: apply_patch(unet, ATCConfig(r=0.5)),
        remove_patch,
    ],
)
def test_another_thread_cannot_change_the_patch_inside_a_block(unet, change):
    with patched(unet, r=0.5):
        merged = run(unet)
        with pytest.raises(ValueError, match=f"thread {REFUSED}"):
            in_thread(lambda: change(unet))
        assert torch.equal(run(unet), merged)
    in_thread(lambda: change(unet))


def test_threads_with_equal_configurations_draw_at_once_and_end_in_any_order(unet):
    exact, both = run(unet), threading.Barrier(2)
    with patched(unet, r=0.5):
        merged = run(unet)

    def draw(first_to_leave: bool) -> list[torch.Tensor]:
        outputs = []
        with patched(unet, ATCConfig(r=0.5)):
            both.wait(20)
            outputs.append(run(unet))
            if not first_to_leave:
                both.wait(20)
                outputs.append(run(unet))
        if first_to_leave:
            both.wait(20)
        return outputs

    with ThreadPoolExecutor(2) as pool:
        outputs = [output for each in pool.map(draw, [True, False]) for output in each]
    assert len(outputs) == 3
    assert all(torch.equal(output, merged) for output in outputs)
    assert torch.equal(run(unet), exact)


@pytest.mark.parametrize("change", [remove_patch, lambda unet: apply_patch(unet, r=0.25)])
def test_a_change_waits_for_calls_of_other_threads(unet, change):
    apply_patch(unet, r=0.5)
    merged, inside, go_on = run(unet), threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        inside.set()
        go_on.wait(20)

    handle = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.register_forward_hook(pause)
    with ThreadPoolExecutor(2) as pool:
        drawing = pool.submit(run, unet)
        inside.wait(20)
        changing = pool.submit(change, unet)
        time.sleep(0.1)
        assert config_of(unet) == ATCConfig(r=0.5)
        go_on.set()
        assert torch.equal(drawing.result(), merged)
        changing.result()
    handle.remove()
    assert config_of(unet) != ATCConfig(r=0.5)


def test_a_block_may_end_inside_a_call_that_a_change_waits_for(unet):
    """As where Python collects a generator that was left half-way."""
    other = copy.deepcopy(unet)
    apply_patch(unet, r=0.5)
    inside, waits = threading.Event(), threading.Event()
    block = patched(other, r=0.25)
    block.__enter__()

    def leave(*_: Any) -> None:
        inside.set()
        waits.wait(20)
        block.__exit__(None, None, None)

    unet.mid_block.register_forward_hook(leave)
    threads = [threading.Thread(target=run, args=[unet], daemon=True)]
    threads[0].start()
    inside.wait(20)
    threads.append(threading.Thread(target=remove_patch, args=[unet], daemon=True))
    threads[1].start()
    time.sleep(0.1)
    waits.set()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert config_of(unet) is None
    assert config_of(other) is None


def test_requests_of_one_event_loop_are_told_apart(unet):
    async def request(r: float, seconds: float) -> Any:
        with patched(unet, r=r):
            await asyncio.sleep(seconds)
            return config_of(unet)

    async def serve(*fractions: float) -> Any:
        return await asyncio.gather(*(request(r, 0.1 + r / 10) for r in fractions), return_exceptions=True)

    first, second = asyncio.run(serve(0.5, 0.25))
    assert first == ATCConfig(r=0.5)
    assert isinstance(second, ValueError)
    assert re.match(f"task {REFUSED}", str(second))
    assert asyncio.run(serve(0.5, 0.5)) == [ATCConfig(r=0.5)] * 2
    assert config_of(unet) is None


def test_a_thread_that_has_ended_holds_no_block(unet):
    in_thread(patched(unet, r=0.5).__enter__)
    apply_patch(unet, r=0.25)
    assert config_of(unet) == ATCConfig(r=0.25)


def test_other_networks_and_copies_are_free(unet):
    other = copy.deepcopy(unet)
    with patched(unet, r=0.5):
        clone = copy.deepcopy(unet)
        for network in (other, clone):
            in_thread(partial(apply_patch, network, r=0.25))
            assert config_of(network) == ATCConfig(r=0.25)
    assert config_of(clone) == ATCConfig(r=0.25)


@pytest.mark.parametrize(
    ("make", "config", "line"),
    [
        (
            lambda: SimpleNamespace(unet=UNet2DConditionModel(**UNET)),
            ATCConfig.fast(levels=[1, 2]),
            r"ATCConfig\(r=1.0, .*\): unet: 3 attentions at level 1, 4096 tokens -> 4096 queries, 512 keys;"
            r" 4 attentions at level 2, 1024 tokens -> 1024 queries, 128 keys \(latents of 64 x 64\)",
        ),
        (
            lambda: timm.create_model("deit_tiny_patch16_224", embed_dim=12, depth=5),
            ViTConfig(r=0.5, blocks=[2, 3]),
            r"ViTConfig\(r=0.5, blocks=\(2, 3\)\): VisionTransformer: 5 attentions, 196 -> 49 patches",
        ),
    ],
)
def test_one_line_of_the_log_says_what_is_patched(make, config, line, caplog):
    caplog.set_level(logging.INFO, "atc_diffusion")
    apply_patch(make(), config)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("atc_diffusion", "INFO")
    assert re.fullmatch(line, record.getMessage())


def test_ctrl_c_while_a_block_waits_for_another_thread_ends_the_block(unet):
    started, stop = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        started.set()
        stop.wait(30)

    handle = unet.mid_block.register_forward_hook(wait)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def leave_while_called() -> None:
        with patched(unet, r=0.5):
            calls.append(pool.submit(lambda: unet(torch.randn(1, 4, 8, 8), 500, torch.randn(1, 5, 12))))
            started.wait(30)
            signal.setitimer(signal.ITIMER_REAL, 0.2)

    calls: list[Any] = []
    before = signal.signal(signal.SIGALRM, interrupt)
    with ThreadPoolExecutor(1) as pool:
        try:
            with pytest.raises(KeyboardInterrupt):
                leave_while_called()
        finally:
            signal.signal(signal.SIGALRM, before)
            stop.set()
        calls[0].result()
        handle.remove()
        pool.submit(apply_patch, unet, r=0.25).result()  # which no open block refuses
    assert str(summary(unet).config) == "ATCConfig(r=0.25)"
