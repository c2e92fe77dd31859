"""What the stack does silently wrong: each trap is shown on the naive code, and then that gandist does not step in it.

A test that fails because the naive code became right is good news: the guard it names can go.
"""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
import tarfile
from pathlib import Path

import accelerate
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import webdataset
from conftest import ENVIRONMENT, ROOT, on_ranks, open_stream, packed, samples
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gandist import penalties
from gandist.cores import cores, quota
from gandist.player import Player, PlayerOptions
from gandist.recipe import Failure

CPU = torch.device("cpu")


def _linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


# ---- launching


# one write a line, so that the lines of two processes do not mix
PLAIN = "import accelerate, os; os.write(1, b'size %d\\n' % accelerate.Accelerator().num_processes)"
OURS = "import os; from gandist.launcher import World; os.write(1, b'size %d\\n' % World.join('auto').ranks)"


def _launch(script: str, tmp_path: Path, *options: str, **variables: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(script)
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, str(path)]
    done = subprocess.run(
        words, env={**ENVIRONMENT, **variables}, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.stdout + done.stderr


@pytest.mark.skipif(torch.accelerator.is_available(), reason="shows what happens on a machine without accelerator")
def test_a_plain_accelerator_makes_two_separate_runs_of_two_cpu_processes(tmp_path: Path) -> None:
    options = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0")
    naive = _launch(PLAIN, tmp_path, *options)
    assert naive.count("size 1") == 2
    ours = _launch(OURS, tmp_path, *options)
    assert ours.count("size 2") == 2


@pytest.mark.skipif(torch.accelerator.is_available(), reason="shows what happens on a machine without accelerator")
def test_accelerate_launch_cpu_with_two_processes_starts_one_and_gandist_says_so(tmp_path: Path) -> None:
    options = ("--cpu", "--num_processes", "2", "--num_machines", "1")
    naive = _launch(PLAIN, tmp_path, *options)
    assert naive.count("size") == naive.count("size 1") == 1
    ours = _launch("from gandist.launcher import World; World.join('auto')", tmp_path, *options)
    assert "accelerate was told to start 2 processes, and 1 runs" in ours


THREADS = "import os, torch; os.write(1, b'threads %d\\n' % torch.get_num_threads())"
JOINED = "from gandist.launcher import World; World.join('auto'); " + THREADS


@pytest.mark.skipif(cores() < 2, reason="one core is no more than the one thread that Accelerate gives")
def test_accelerate_leaves_all_cores_but_one_idle_unless_the_user_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ENVIRONMENT, "OMP_NUM_THREADS", raising=False)
    options = ("--num_processes", "1", "--num_machines", "1")
    assert "threads 1\n" in _launch(THREADS, tmp_path, *options)
    assert f"threads {cores()}\n" in _launch(JOINED, tmp_path, *options)
    assert "threads 1\n" in _launch(JOINED, tmp_path, *options, OMP_NUM_THREADS="1")
    assert "threads 1\n" in _launch(JOINED, tmp_path, *options, "--num_cpu_threads_per_process", "1")
    two = _launch(JOINED, tmp_path, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", *options[2:])
    assert two.count(f"threads {cores() // 2}\n") == 2


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.cfs_quota_us": "400000\n", "cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "what\n"}, None),
        ({}, None),
    ],
)
def test_the_cores_of_a_container_are_those_it_was_allowed(
    tmp_path: Path, files: dict[str, str], found: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert quota((tmp_path / "cpu.max", tmp_path / "cpu.cfs_quota_us")) == found


FAULTS = """
import os, resource, torch
{}
tensors = lambda: [torch.zeros(40 << 20, dtype=torch.uint8) for _ in range(3)]
for _ in range(4): tensors()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): tensors()
os.write(1, b"faults %d\\n" % (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library allocates otherwise")
def test_glibc_gives_large_tensors_back_each_time_and_a_run_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in ENVIRONMENT if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delitem(ENVIRONMENT, name)
    join = "from gandist.launcher import World; World.join('auto')"
    found = []
    for act, more in (("", {}), (join, {}), (join, {"MALLOC_TRIM_THRESHOLD_": "131072"})):
        words = [sys.executable, "-c", FAULTS.format(act)]
        done = subprocess.run(words, env={**ENVIRONMENT, **more}, cwd=ROOT, capture_output=True, text=True, timeout=120)
        found.append(int(done.stdout.split()[1]))
    alone, kept, told = found
    assert alone > 10 * kept
    assert told > 10 * kept


# ---- DistributedDataParallel


def _two_forwards_two_backwards() -> tuple[float, float]:
    """The gradient after two forwards and two backwards, and after the one backward of a turn, on each rank's own data."""
    data = torch.full((4, 3), float(1 + dist.get_rank()))
    naive = DistributedDataParallel(_linear())
    first, second = naive(data).mean(), naive(10 * data).mean()
    first.backward()
    second.backward()
    assert naive.module.weight.grad is not None
    player = Player("d", _linear(), PlayerOptions(), device=CPU)
    with player.turn(0, 4) as turn:
        turn.backward(player(data).mean() + player(10 * data).mean())
    player.settle()
    grad = player.parameters[0].grad
    assert grad is not None
    return float(naive.module.weight.grad[0, 0]), float(grad[0, 0])


def test_two_backwards_after_two_forwards_leave_the_second_gradient_local() -> None:
    (naive0, ours0), (naive1, ours1) = on_ranks(2, _two_forwards_two_backwards)
    assert naive0 != naive1  # 16.5 is right; no error was raised
    assert ours0 == ours1 == pytest.approx(16.5)


def _statistics() -> tuple[Tensor, Tensor]:
    torch.manual_seed(dist.get_rank())
    data = torch.randn(8, 4) + dist.get_rank()
    naive = DistributedDataParallel(nn.BatchNorm1d(4), broadcast_buffers=False)
    naive(data).sum().backward()
    player = Player("d", nn.BatchNorm1d(4), PlayerOptions(), device=CPU)
    with player.turn(0, 8) as turn:
        turn.backward(player(data).square().mean())
    player.settle()
    running = naive.module.running_mean
    assert isinstance(running, Tensor)
    return running, player.module.running_mean  # type: ignore[return-value]


def test_running_statistics_drift_apart_without_broadcast_and_are_averaged_in_a_turn() -> None:
    (naive0, ours0), (naive1, ours1) = on_ranks(2, _statistics)
    assert not torch.equal(naive0, naive1)
    assert torch.equal(ours0, ours1)
    assert torch.allclose(ours0, (naive0 + naive1) / 2)


def _critic() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def _penalised(judge: penalties.Judge, data: Tensor) -> Tensor:
    """An adversarial term and R1, which asks for a gradient with respect to the data on the way."""
    return nn.functional.softplus(-judge(data)).mean() + 5 * penalties.r1(judge, data)


def _gradients(module: nn.Module) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in module.parameters() if weight.grad is not None])


def _with_r1() -> list[Tensor]:
    """The gradient of these rows alone, of all rows, and what DDP, DDP with a static graph, and a player make of these rows."""
    torch.manual_seed(1)
    everything, rank = torch.randn(8, 3), dist.get_rank()
    data = everything[4 * rank : 4 * rank + 4]
    alone, whole, plain, static = (_critic() for _ in range(4))
    _penalised(alone, data).backward()
    _penalised(whole, everything).backward()
    wrapped = DistributedDataParallel(plain), DistributedDataParallel(static, static_graph=True)
    for judge in wrapped:
        _penalised(judge, data).backward()
    player = Player("d", _critic(), PlayerOptions(), device=CPU)
    with player.turn(0, 8) as turn:
        turn.backward(_penalised(player, data))
    player.settle()
    return [_gradients(module) for module in (alone, whole, plain, static, player.module)]


def test_a_static_graph_leaves_the_gradients_of_a_penalty_local_and_a_turn_reduces_them() -> None:
    ranks: list[list[Tensor]] = on_ranks(2, _with_r1)  # type: ignore[assignment]
    for alone, whole, plain, static, ours in ranks:
        assert torch.equal(static, alone)  # never reduced, and no error was raised
        assert not torch.allclose(alone, whole, rtol=0.1)
        # without a static graph the gradient is exact, though autograd.grad went through the wrapped module on the way
        assert torch.allclose(plain, whole, rtol=1e-5, atol=1e-6)
        assert torch.allclose(ours, whole, rtol=1e-5, atol=1e-6)
    (*_, static0, ours0), (*_, static1, ours1) = ranks
    assert not torch.allclose(static0, static1, rtol=0.1)
    assert torch.equal(ours0, ours1)


# ---- Accelerate


def test_accelerates_scheduler_steps_once_for_each_process() -> None:
    naive = on_ranks(2, _prepared_rate)
    assert naive == pytest.approx([1 / 3, 1 / 3])  # 1/(1+2) after one step, where 1/2 was asked for


def _prepared_rate() -> float:
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(_linear().parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    optimizer.step()
    scheduler.step()
    return float(optimizer.param_groups[0]["lr"])


def test_accelerates_checkpoint_pickles_the_optimizer(tmp_path: Path) -> None:
    """gandist's own is shown free of it in test_checkpoint.py."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = _linear()
    accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    accelerator.save_state(str(tmp_path / "state"))
    assert {"optimizer.bin", "random_states_0.pkl"} <= {path.name for path in (tmp_path / "state").iterdir()}


# ---- precision


def test_one_autocast_context_round_a_step_computes_with_old_weights() -> None:
    naive = _linear()
    with torch.autocast("cpu", torch.bfloat16):
        before = naive(torch.ones(1, 3))
        before.sum().backward()
        with torch.no_grad():
            naive.weight += 1
        assert torch.equal(naive(torch.ones(1, 3)), before)  # 3 higher, had the cache noticed
    player = Player("d", _linear(), PlayerOptions(), device=CPU, precision="bf16")
    with player.turn(0, 1) as turn:
        before = player(torch.ones(1, 3))
        turn.backward(before.float().sum())
        with torch.no_grad():
            player.parameters[0] += 1
        assert player(torch.ones(1, 3)).item() == pytest.approx(before.item() + 3, abs=0.05)


def test_unwrapping_with_accelerate_takes_the_precision_off_the_live_model() -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare_model(nn.Conv2d(1, 1, 1))
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert model(torch.zeros(1, 1, 1, 1)).dtype == torch.float32
    player = Player("d", nn.Conv2d(1, 1, 1), PlayerOptions(), device=CPU, precision="bf16")
    with player.evaluating() as module:
        assert module(torch.zeros(1, 1, 1, 1)).dtype == torch.bfloat16
    assert player(torch.zeros(1, 1, 1, 1)).dtype == torch.bfloat16
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


# ---- files


def test_safetensors_takes_flipped_bits_and_refuses_channels_last() -> None:
    data = bytearray(safetensors.torch.save({"w": torch.ones(4)}))
    data[-1] ^= 1
    assert not torch.equal(safetensors.torch.load(bytes(data))["w"], torch.ones(4))  # and no error
    with pytest.raises(ValueError, match="non contiguous"):
        safetensors.torch.save({"w": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)})


def test_webdataset_loses_samples_of_a_damaged_shard_in_silence_and_the_reader_does_not(tmp_path: Path) -> None:
    from gandist.data.index import scan
    from gandist.data.read import Reader
    from gandist.recipe import InputError

    np.savez(tmp_path / "x.npz", images=np.zeros((20, 8, 8), np.uint8))
    dataset = packed(tmp_path / "x.npz", tmp_path / "x")
    shard = tmp_path / "x" / "train-000000.tar"
    damaged = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        position = tar.getmembers()[7].offset
    damaged[position + 10] ^= 1
    shard.write_bytes(damaged)
    assert len(list(webdataset.WebDataset(str(shard), shardshuffle=False))) == 7  # of 20
    with pytest.raises(InputError, match=f"at byte {position}"):
        list(scan(shard))
    reader = Reader(dataset, "train")
    assert len([reader.members(number) for number in range(20)]) == 20  # the index knows where each one lies
    with pytest.raises(Failure, match="damaged"):
        dataset.verify()


def test_webdatasets_shuffle_ignores_every_seed_and_the_stream_does_not(fashion: Path) -> None:
    def naive() -> list[str]:
        torch.manual_seed(0)
        np.random.seed(0)
        shards = [str(path) for path in sorted(fashion.glob("*.tar"))]
        return [
            s["__key__"]
            for s, _ in zip(webdataset.WebDataset(shards[:1], shardshuffle=False).shuffle(100), range(50), strict=False)
        ]

    assert naive() != naive()
    streams = [open_stream(fashion, batch=50) for _ in range(2)]
    assert streams[0].numbers(3) == streams[1].numbers(3)
    for stream in streams:
        stream.close()


# ---- averages


def test_an_average_copied_after_wrapping_would_carry_the_wrapper(tmp_path: Path) -> None:
    """The EMA is copied from the bare module before anything wraps it: its names are the network's own."""
    from gandist.player import EmaOptions

    player = Player("g", _linear(), PlayerOptions(ema=EmaOptions()), device=CPU)
    assert player.ema is not None
    assert player.ema.state_dict().keys() == _linear().state_dict().keys()
    assert copy.deepcopy(player.module).state_dict().keys() == player.tensors()["ema"].keys()


def _accumulated() -> list[bool]:
    """Whether two players' gradients were synchronised in each of two steps of `accumulate(D)`, `accumulate(G)`."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    players = [accelerator.prepare_model(_linear()) for _ in range(2)]
    found = []
    for _ in range(2):
        for player in players:
            with accelerator.accumulate(player):
                found.append(accelerator.sync_gradients)
    return found


def test_accelerates_accumulate_counts_both_players_together() -> None:
    """So of two steps the discriminator never synchronises, and the generator always does."""
    assert on_ranks(2, _accumulated) == [[False, True, False, True]] * 2


def test_one_scaler_for_two_players_counts_every_step_twice() -> None:
    shared = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    optimizers = [torch.optim.SGD(_linear().parameters(), lr=0.1) for _ in range(2)]
    for optimizer in optimizers:
        shared.scale(optimizer.param_groups[0]["params"][0].sum()).backward()
        shared.step(optimizer)
        shared.update()
    assert shared.get_scale() == 2048.0  # after one step of the game; two were asked for
    players = [Player(name, _linear(), PlayerOptions(), device=CPU, precision="fp16") for name in "dg"]
    scales = [player.scaler.get_scale() for player in players]
    for player in players:
        with player.turn(0, 1) as turn:
            turn.backward(0.1 * player(torch.ones(1, 3)).float().sum())
        assert player.scaler.state_dict()["_growth_tracker"] == 1
    assert [player.scaler.get_scale() for player in players] == scales


def _prepared_frozen() -> str:
    try:
        accelerate.Accelerator(cpu=True).prepare_model(_linear().requires_grad_(False))
    except RuntimeError as error:
        return str(error)
    return "prepared"


def test_accelerate_cannot_prepare_a_frozen_network() -> None:
    assert all("not needed" in str(message) for message in on_ranks(2, _prepared_frozen))


def _half_lost(shards: list[str]) -> list[int]:
    data = webdataset.WebDataset(shards, nodesplitter=webdataset.split_by_node, shardshuffle=False)
    loader = torch.utils.data.DataLoader(data.map(lambda sample: int(sample["__key__"])), batch_size=4, num_workers=0)
    prepared = accelerate.Accelerator(cpu=True).prepare(loader)
    return [int(key) for batch in prepared for key in batch]


def test_a_prepared_loader_of_split_shards_loses_half_the_data_and_the_stream_loses_none(tmp_path: Path) -> None:

    np.savez(tmp_path / "x.npz", images=np.zeros((160, 8, 8), np.uint8))
    packed(tmp_path / "x.npz", tmp_path / "x", shard_samples=20)
    shards = [str(path) for path in sorted((tmp_path / "x").glob("*.tar"))]
    read = on_ranks(2, _half_lost, shards)
    assert len({key for keys in read for key in keys}) == 80  # of 160, and no error
    ours = [
        samples(draw, range(8 * rank, 8 * rank + 8), batch=16, length=160, seed=0)
        for draw in range(10)
        for rank in (0, 1)
    ]
    assert sorted(np.concatenate(ours)) == list(range(160))
