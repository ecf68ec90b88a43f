"""The coordinator's configuration: one frozen Struct, read as JSON, checked before a socket opens.

Everything here is resolved: "auto" has become a value in the launcher. Durations are in seconds.
"""

import ipaddress
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import ConfigError
from protocol.kv import DTYPE_BYTES
from protocol.process.failpoints import Failpoints

MIN_TEXT_MEMORY_BYTES = 512 << 20  # below, not even a worker's libraries are sure to load
_ORIGIN = re.compile(r"https?://[^/\s*]+")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
GENERATION_CONFIGS = ("auto", "none")


class ExpectedPool(msgspec.Struct, frozen=True):
    """A pool that has to serve before the cluster is ready."""

    pool_id: str
    role: str  # "prefill", "decode" or "store"
    cp_size: int
    tp_size: int

    @property
    def num_ranks(self) -> int:
        return self.cp_size * self.tp_size


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one caller may ask for. Each has its row in the tests, at the limit and beyond it."""

    max_body_bytes: int = 64 << 20  # a prompt of a million token ids takes some 8 MB
    max_total_body_bytes: int = 1 << 30  # of all bodies that are being received or read
    max_tenant_body_share: float = 0.5  # of those, that one key may have when there are several
    max_headers: int = 100
    max_header_bytes: int = 32 << 10
    header_timeout_s: float = 10.0
    body_idle_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    max_json_depth: int = 32
    max_json_objects: int = 20_000
    max_json_values: int = 2_000_000  # of every kind; a prompt's token ids are some
    max_messages: int = 2048
    max_content_parts: int = 64
    max_prompts: int = 128  # prompts of one completion request
    max_prompt_tokens: int = 4_000_000  # of all its prompts together
    max_choices: int = 128  # n
    max_sequences: int = 1024  # prompts x n of one request
    max_stops: int = 32
    max_stop_chars: int = 256
    max_logit_bias: int = 1024
    max_requests: int = 4096  # sequences in the cluster at one time, waiting ones included
    max_connections: int = 8192  # and no more than the limit of open files leaves room for
    tenant_share: float = 0.75  # of those, that one key may have while there are several
    max_label_chars: int = 4096  # user, and each value of metadata
    max_upload_bytes: int = 512 << 20  # a multipart body, where files are uploaded
    upload_timeout_s: float = 3600.0
    max_upload_fields: int = 32  # beside the file
    max_upload_field_bytes: int = 64 << 10  # of all fields together

    def tenant_requests(self, num_tenants: int) -> int:
        """Sequences that one of so many tenants may have: who is alone may have all."""
        share = self.tenant_share if num_tenants > 1 else 1.0
        return max(1, math.floor(self.max_requests * share))

    def tenant_body_bytes(self, num_tenants: int) -> int:
        """The same of bodies; there is room for one of the largest in any case."""
        share = self.max_tenant_body_share if num_tenants > 1 else 1.0
        return max(self.max_body_bytes, int(share * self.max_total_body_bytes))


class BatchLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What files and batches may take, and when batches may run."""

    min_free_bytes: int = 512 << 20  # on the disk, below which nothing is accepted
    max_files: int = 10_000  # of one tenant
    file_ttl_s: float = 30 * 86_400.0  # of a batch's input and output, if no other was asked for
    max_lines: int = 50_000  # of one batch
    max_batch_bytes: int = 200 << 20
    max_open: int = 64  # batches of one tenant that have not ended
    max_all_open: int = 1_000
    max_errors: int = 100  # wrong lines that a refused batch lists
    window_s: float = 86_400.0  # after which a batch expires
    keep_s: float = 30 * 86_400.0  # how long an ended batch can be looked at
    max_running: int = 4  # lines that are computed at one time, of all batches
    max_interactive: int = 4  # sequences of other callers, above which no line is begun
    retry_s: float = 0.5  # before a line is tried again that the cluster had no room for; doubled
    max_retry_s: float = 30.0


class JobLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What documents may take of the cluster, and their callers of the coordinator."""

    max_documents: int = 10_000  # of all tenants, ended ones included
    max_tenant_documents: int = 1_000
    max_waiting: int = 1_000  # of all tenants, that are not ready yet
    max_tenant_waiting: int = 200
    max_watchers: int = 1_000  # of all tenants: GETs that wait, and streams of events
    max_tenant_watchers: int = 100
    tenant_quota_bytes: int = 0  # of texts, files and KV; 0: half the disk quota if there are keys
    max_running: int = 0  # documents that are computed at one time; 0 takes one per prefill pool
    segment_tokens: int = 8192  # a document goes on from the last whole segment
    max_events: int = 1_000  # of one document that are kept, the newest
    progress_interval_s: float = 0.5  # between two progress events
    max_wait_s: float = 60.0  # of a GET that waits for the end
    max_priority: int = 100
    retry_s: float = 0.5  # before a document is tried again; doubled each time
    max_retry_s: float = 30.0
    max_crashes: int = 2  # of this process, with the same work; then it is set aside
    max_reading: int = 3  # documents that are read and encoded at one time, of one tenant one less
    parse_attempts: int = 2
    parse_timeout_s: float = 120.0
    parse_cpu_s: int = 100  # of the processor, for one file
    parse_memory_bytes: int = 2 << 30
    max_text_bytes: int = 256 << 20  # that a file may become
    idempotency_s: float = 86_400.0
    default_pin_s: float = 86_400.0
    max_pin_s: float = 30 * 86_400.0
    disk_quota_bytes: int = 64 << 30
    pinned_share: float = 0.5  # of the quota, that may be pinned by all tenants together
    tenant_pin_share: float = 0.4  # of the quota, that one tenant may pin in any mode
    hard_pin_share: float = 0.25  # of the quota, that one tenant may pin hard


class CoordinatorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One coordinator process.

    Raises:
        ConfigError: a field, or two together, that cannot be served with.
    """

    token: str  # the cluster's secret, which every rank must know
    model: str  # a checkpoint folder, or the name of a built-in model
    pools: tuple[ExpectedPool, ...]
    control_listen: str = "tcp://127.0.0.1:*"  # or ipc://PATH
    host: str = "127.0.0.1"
    port: int = 8000  # 0 takes a free one
    served_model_names: tuple[str, ...] = ()  # the first is shown; none takes the model's own
    chat_template: str = ""  # a file that replaces the checkpoint's
    tool_call_parser: str = "auto"  # how calls of tools are read: by the chat template, or a name
    reasoning_parser: str = "auto"
    default_chat_template_kwargs: dict[str, Any] = {}  # of requests that say nothing else
    generation_config: str = "auto"  # "none": its sampling parameters are nobody's defaults
    block_size: int = 32
    kv_dtype: str = ""  # what the ranks keep KV in; "" takes the model's own
    kv_memory_from: str = "as asked for"  # how the size of the ranks' KV memory was found
    max_model_len: int | None = None
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()  # names of this server, if nobody is asked for a key
    cors_origins: tuple[str, ...] = ()  # of pages that may use it from elsewhere
    api_key_file: str = ""  # more of them, one a line; read again when it changes
    secret: str = ""  # salts every tenant's cache; "" takes the token
    local_prefill_threshold: int = 128  # new tokens, up to which the decode pool computes them
    session_ttl_s: float = 3600.0
    ready_timeout_s: float = 600.0
    heartbeat_timeout_s: float = 4.0  # a rank that is silent for longer is lost
    step_budget_s: float = 60.0  # a rank that is in one step for longer is lost
    start_silence_s: float = 60.0  # as heartbeat_timeout_s, while a rank loads its model
    rejoin_timeout_s: float = 10.0  # a running gang that does not come back in time is lost
    shutdown_grace_s: float = 30.0  # what runs may take so long to end once the cluster is to
    max_loop_lag_s: float = 1.0  # of the event loop, beyond which the coordinator is not ready
    header_wait_s: float = 2.0  # a stream's headers wait so long for the first token
    keep_alive_s: float = 15.0
    send_timeout_s: float = 30.0  # a reader that takes nothing for so long is gone
    release_grace_s: float = 5.0  # a pool may hold a finished request so long before it is told
    max_attempts: int = 4  # of one request, on any pools
    failover_wait_s: float = 30.0  # a request that has lost its pool waits so long for another
    resume_wait_s: float = 2.0  # for a pool to close a lost attempt, and keep what has arrived
    stall_timeout_s: float = 5.0  # without a word of a request, after which its pools are asked
    handoff_timeout_s: float = 30.0  # from the first token to the commit, else it is tried again
    poison_deaths: int = 2  # pools that a request may take with it before it is quarantined
    quarantine_s: float = 3600.0
    non_finite_requests: int = 3  # whose logits a pool spoils before it is lost
    non_finite_window_s: float = 600.0  # within which
    num_text_workers: int = 1  # processes for small requests; large ones and documents have others
    text_timeout_s: float = 10.0  # of one stage of reading a request, and a share for its size
    text_memory_bytes: int = 4 << 30  # of the address space of one such process
    background_chunk_tokens: int = 64  # of each rank, while many wait for answers: see admission.py
    limits: Limits = Limits()
    data_dir: str = ""  # what must survive a restart: jobs, documents; "" forgets them at the end
    jobs: JobLimits = JobLimits()
    batches: BatchLimits = BatchLimits()
    log_level: str = "INFO"
    failpoints: str = ""  # faults to inject, see protocol.process.failpoints; none by default
    parent_pid: int = 0  # end when this process ends; 0 outlives it
    epoch: int = 0  # higher than that of every coordinator before; 0 takes it from the clock
    is_restart: bool = False  # the cluster runs already: what is missing in it does not end us
    rejoining: tuple[str, ...] = ()  # pools that run already and will say HELLO
    restart_budget: int = 0  # whoever starts us does so this often in a window; 0: not known
    restart_window_s: float = 600.0

    def __post_init__(self) -> None:
        if not (self.api_keys or self.api_key_file) and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines and nobody would be asked "
                f"for a key: add --api-key-file FILE or --api-key KEY, or listen on 127.0.0.1"
            )
        check_keys(self.api_keys, "--api-key")
        self._check_origins()
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: must be between 0 (any free one) and 65535")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"--log-level {self.log_level}: choose one of {LOG_LEVELS}")
        self._check_pools()
        if self.kv_dtype and self.kv_dtype not in DTYPE_BYTES:
            raise ConfigError(f"kv_dtype {self.kv_dtype}: choose one of {tuple(DTYPE_BYTES)}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"--max-model-len {self.max_model_len}: must be at least 2 tokens")
        self._check_model()
        self._check_text()
        self._check_crashes()
        self._check_failover()
        Failpoints(self.failpoints)

    def _check_model(self) -> None:
        if self.generation_config not in GENERATION_CONFIGS:
            raise ConfigError(
                f"--generation-config {self.generation_config}: choose one of {GENERATION_CONFIGS}"
            )
        if any(not name or not name.isprintable() for name in self.served_model_names):
            raise ConfigError("--served-model-name: a name is printable text, and not empty")

    def _check_crashes(self) -> None:
        """What ends processes must be found out before they are no longer started again."""
        for name, budget in (
            ("jobs.max_crashes", self.jobs.max_crashes),
            ("poison_deaths", self.poison_deaths),
        ):
            if budget < 1:
                raise ConfigError(f"{name} {budget}: must be at least 1")
            if 0 < self.restart_budget <= budget:
                raise ConfigError(
                    f"{name} {budget} and restart_budget {self.restart_budget}: work that ends "
                    f"processes is set aside after {name} of them, which must be fewer than are "
                    f"started again: lower {name}, or raise restart_budget"
                )

    def _check_text(self) -> None:
        if self.num_text_workers < 1:
            raise ConfigError("num_text_workers: must be at least 1")
        if self.text_timeout_s <= 0:
            raise ConfigError("text_timeout_s: must be above 0")
        if self.text_memory_bytes < MIN_TEXT_MEMORY_BYTES:
            raise ConfigError(f"text_memory_bytes: must be at least {MIN_TEXT_MEMORY_BYTES}")
        if not 0 < self.limits.max_tenant_body_share <= 1:
            raise ConfigError("limits.max_tenant_body_share: must be above 0, and 1 at most")
        if self.limits.max_total_body_bytes < self.limits.max_body_bytes:
            raise ConfigError("limits.max_total_body_bytes: must be at least max_body_bytes")

    def _check_origins(self) -> None:
        if "*" in self.cors_origins and not (self.api_keys or self.api_key_file):
            raise ConfigError(
                "--cors-origin *: without --api-key every page in a browser on this machine could "
                "use the server: name the pages, as http://localhost:3000"
            )
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origin {origin}: write http://NAME[:PORT] or https://NAME[:PORT]"
                )

    def _check_failover(self) -> None:
        if not 0.0 < self.limits.tenant_share <= 1.0:
            raise ConfigError("limits.tenant_share: must be above 0, and 1 at most")
        if min(self.max_attempts, self.non_finite_requests) < 1:
            raise ConfigError("max_attempts and non_finite_requests: must be at least 1")
        if min(self.failover_wait_s, self.resume_wait_s, self.quarantine_s) < 0:
            raise ConfigError("failover_wait_s, resume_wait_s and quarantine_s: must be at least 0")
        if min(self.stall_timeout_s, self.handoff_timeout_s) <= 0:
            raise ConfigError("stall_timeout_s and handoff_timeout_s: must be above 0")
        if self.max_loop_lag_s <= 0:
            raise ConfigError("max_loop_lag_s: must be above 0")
        if self.shutdown_grace_s < 0:
            raise ConfigError("shutdown_grace_s: must be at least 0")

    def _check_pools(self) -> None:
        if not any(pool.role == "decode" for pool in self.pools):
            raise ConfigError("no decode pool: add --decode tp1")
        names = {pool.pool_id for pool in self.pools}
        if len(names) < len(self.pools):
            raise ConfigError("two pools have the same name: pool_id must be unique")
        if not names.issuperset(self.rejoining):
            raise ConfigError(f"rejoining {self.rejoining}: no such pools")

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that requests give and ``/v1/models`` lists."""
        return self.served_model_names or (Path(self.model).name,)

    @property
    def model_name(self) -> str:
        """The first of them, which answers carry."""
        return self.model_names[0]


def check_keys(keys: Iterable[str], origin: str) -> None:
    """Refuse what cannot be sent in a header, without showing it.

    Raises:
        ConfigError: naming ``origin``.
    """
    for key in keys:
        if not key:
            raise ConfigError(f"{origin}: a key cannot be empty")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{origin}: a key is printable ASCII without spaces")


def public(config: CoordinatorConfig) -> CoordinatorConfig:
    """It, without what is secret: for processes that run code of checkpoints.

    Nor does it say who is let in, so that what is refused without keys is not refused here.
    """
    return msgspec.structs.replace(
        config,
        token="",
        secret="",
        api_keys=(),
        api_key_file="",
        cors_origins=(),
        host="127.0.0.1",
        failpoints="",
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a socket that listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_config(path: str) -> CoordinatorConfig:
    """The configuration in a JSON file.

    Raises:
        ConfigError: unreadable, or not what :class:`CoordinatorConfig` asks for.
    """
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=CoordinatorConfig)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:  # ValidationError is one, and wraps our own ConfigError
        raise ConfigError(str(error)) from error
