"""The process of a rank before and around its loop, the same for every role.

The life of a rank's process
1. ``main`` reads the configuration, ties the process to its parent's life and to signals, and calls
   the role's ``serve``.
2. A rank that computes loads its shard, whose size decides how much KV there is room for.
3. ``start_rank`` binds the leader's sockets and starts the transfer thread, which says HELLO.
   ``RankProcess.form_gang``: the coordinator's WELCOME, torch.distributed, the plan channel.
   ``start_shard`` does all that.
4. The role warms up, sends GangReady and enters its loop: the leader's is ``RankProcess.lead``, a
   follower's is ``follow``.
5. Shutdown, a signal or the leader's Stop: exit code 0. A mistake of the operator: 2. The rest: 1.

No rank outlives its gang: the parent's death kills the process, the transfer thread's death ends
it.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import msgspec
import torch
import zmq

from engine.kv_memory import LargestStep, device_index, size_pool
from engine.plan_channel import LeaderChannel
from engine.process import RankProcess
from engine.rank_config import RankConfig
from engine.transfer_thread import TransferThread
from kvcache.pool import KVPool
from kvtransfer.identity import RankIdentity, TransferConfig
from modeling.checkpoint.config import ModelConfig, load_config
from modeling.checkpoint.dtypes import serving_dtype
from modeling.loader import load_model
from modeling.model import Model
from modeling.parallel import UnconnectedRank, make_tensor_parallel, open_gang_store
from protocol.errors import BatonError, ConfigError, PeerError
from protocol.messages import GangAddress
from protocol.plans import Stop
from protocol.process.ending import ASKED, END, die_with_parent
from protocol.process.logs import configure_logging, finish_output
from protocol.sockets import open_context

EXIT_CLEAN, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2
STOP_TIMEOUT_S = 5.0
FAREWELL_S = 5.0  # after the grace, for the coordinator's Shutdown to arrive

_log = logging.getLogger(__name__)

C = TypeVar("C", bound=RankConfig)


# -- the process -----------------------------------------------------------------------------------


def main(role: str, config_type: type[C], serve: Callable[[C], None]) -> NoReturn:
    """The whole of a role's ``__main__``: run ``serve`` on the file named by ``--config``."""
    parser = argparse.ArgumentParser(prog=role, description=f"One rank of a {role} pool.")
    parser.add_argument("--config", required=True, help="JSON file of this rank's configuration")
    code = _run(lambda: serve(_prepare(parser.parse_args().config, config_type)))
    finish_output()
    # Threads of gloo, UCX or a hung collective must not keep a finished process alive.
    os._exit(code)


def run_here(config: bytes, config_type: type[C], serve: Callable[[C], None]) -> int:
    """Run a rank in this process, which exists already.

    Args:
        config: the rank's configuration as JSON.
        config_type: of the role.
        serve: of the role.

    Returns:
        The exit code for the process.
    """

    def body() -> None:
        decoded = msgspec.json.decode(config, type=config_type)
        configure_logging(f"{decoded.pool_id}/{decoded.rank}", decoded.log_level)
        torch.set_num_threads(decoded.threads)
        serve(decoded)

    return _run(body)


def _run(body: Callable[[], None]) -> int:
    os.umask(0o077)  # KV of a data folder is the operator's alone
    try:
        body()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_CLEAN
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the operator reads this line
        return EXIT_CONFIG
    except BatonError as error:
        _log.error("ending: %s", error)
        return EXIT_FAILED
    except Exception:  # noqa: BLE001 - the process's outermost frame: a bug ends it, with its trace
        _log.exception("ending by a bug")
        return EXIT_FAILED
    return EXIT_CLEAN


def _prepare(path: str, config_type: type[C]) -> C:
    config = read_config(path, config_type)
    configure_logging(f"{config.pool_id}/{config.rank}", config.log_level)
    die_with_parent(config.parent_pid)
    end_on_signals(config)
    torch.set_num_threads(config.threads)
    return config


def end_on_signals(config: RankConfig) -> None:
    """Let the signals END and ASKED end this process.

    A rank with a parent does not obey ASKED (such as Ctrl-C) at once: the signal may have come to
    the whole cluster, and the coordinator then ends the ranks when their requests are done. If the
    coordinator does not, the rank ends by itself after the grace, or at a second signal.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        # Another signal must not interrupt the way out.
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for other in (number, signal.SIGALRM):
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(EXIT_CLEAN)

    def wait(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, stop)
        signal.setitimer(signal.ITIMER_REAL, config.shutdown_grace_s + FAREWELL_S)

    for number in (END, signal.SIGALRM):
        signal.signal(number, stop)
    for number in ASKED:
        signal.signal(number, wait if config.parent_pid else stop)


def read_config(path: str, config_type: type[C]) -> C:
    """The configuration in a JSON file.

    Raises:
        ConfigError: unreadable, or not what ``config_type`` asks for.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=config_type)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:  # ValidationError is one
        raise ConfigError(f"--config {path}: {error}") from error


# -- the rank --------------------------------------------------------------------------------------


def resolve_device(config: RankConfig) -> torch.device:
    """This rank's device.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch sees no CUDA device here, use --device cpu")
    if config.device == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", device_index(config.rank, torch.cuda.device_count()))


@dataclass(frozen=True)
class Shard:
    """A rank that computes: its process, its part of the model, its KV."""

    process: RankProcess
    model_config: ModelConfig
    model: Model
    pool: KVPool
    num_blocks: int  # that the scheduler may use: the fewest of any rank of the gang
    device: torch.device


@contextlib.contextmanager
def start_shard(role: str, config: RankConfig, largest: LargestStep) -> Iterator[Shard]:
    """Load this rank's part of the weights, size the KV pool, say HELLO, form the gang.

    Args:
        role: "prefill" or "decode".
        config: of the rank.
        largest: the limits of one step, and of the pool.

    Yields:
        The rank, whose gang has formed.

    Raises:
        ConfigError: it cannot run as configured.
        PeerError: the gang has broken.
        SystemExit: it was asked to stop.
    """
    model_config = load_config(config.model, max_model_len=config.max_model_len)
    device = resolve_device(config)
    dtype = serving_dtype(config.dtype, model_config, str(device))
    model = load_model(
        config.model,
        tp=UnconnectedRank(config.tp_rank, config.tp_size),
        dtype=dtype,
        device=str(device),
        max_model_len=config.max_model_len,
    )
    layout = size_pool(config, model, dtype, largest)
    pool = KVPool(layout, device)
    with start_rank(role, config, model_config, pool) as process:
        num_blocks = process.form_gang(device) or layout.num_blocks
        model.connect(
            make_tensor_parallel(
                config.rank, config.cp_size, config.tp_size, device, same_host=config.same_host
            )
        )
        yield Shard(process, model_config, model, pool, num_blocks, device)


@contextlib.contextmanager
def start_rank(
    role: str, config: RankConfig, model: ModelConfig, pool: KVPool
) -> Iterator[RankProcess]:
    """Say HELLO and be a rank. When the context is left, all that it has started has ended.

    Raises:
        ConfigError: a socket cannot be bound.
    """
    identity = RankIdentity(
        role=role,
        pool_id=config.pool_id,
        rank=config.rank,
        cp_size=config.cp_size,
        tp_size=config.tp_size,
        incarnation=uuid.uuid4().hex,
    )
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(open_context(config.token))
        leader = _bind_leader(config, identity, context) if config.is_leader else None
        store_fd = -1
        gang = None
        if leader is not None:
            stack.callback(leader.close)
            store_address, store_fd = _open_store(config, identity)
            gang = GangAddress(plan=leader.address, store=store_address)
        thread = TransferThread(identity, _transfer_config(config, model), pool, gang)
        thread.start()
        stack.callback(thread.stop, STOP_TIMEOUT_S)
        process = RankProcess(config, identity, thread, context)
        process.leader = leader
        process.store_fd = store_fd
        stack.callback(_dismiss, process)
        yield process


def _bind_leader(
    config: RankConfig, identity: RankIdentity, context: zmq.Context[zmq.Socket[bytes]]
) -> LeaderChannel:
    if config.same_host:
        # A new name each time, so that a late follower of an earlier gang cannot join this one.
        address = f"{config.listen}/{config.pool_id}-plan-{identity.incarnation[:8]}"
    else:
        address = f"{config.listen}:*"
    return LeaderChannel(context, address, world_size=config.world_size)


def _open_store(config: RankConfig, identity: RankIdentity) -> tuple[str, int]:
    if config.world_size == 1:
        return "", -1
    if config.same_host:
        folder = config.listen.removeprefix("ipc://")
        return f"file://{folder}/{config.pool_id}-store-{identity.incarnation[:8]}", -1
    return open_gang_store(config.listen.removeprefix("tcp://"))


def _transfer_config(config: RankConfig, model: ModelConfig) -> TransferConfig:
    return TransferConfig(
        control_address=config.control_address,
        token=config.token,
        transport=config.transport,
        listen=config.listen,
        checksum=config.checksum,
        model_fingerprint=model.fingerprint,
        max_model_len=config.max_model_len or model.max_model_len,
        gang_start=config.gang_start,
        coordinator_timeout_s=config.coordinator_timeout_s,
        hello_timeout_s=config.start_timeout_s,
        lease_s=config.lease_s,
        failpoints=config.failpoints,
    )


def _dismiss(process: RankProcess) -> None:
    """Send Stop to the followers, which wait for a plan. They may be gone already."""
    if process.leader is not None:
        with contextlib.suppress(PeerError):
            process.leader.broadcast(Stop())
    if process.follower is not None:
        process.follower.close()
