"""The flags of ``baton serve``, with the defaults that ``ServeConfig`` has."""

import argparse
from typing import Any

from launcher.config import ServeConfig

EPILOG = """\
a pool is written cp2, tp2 or cp4tp2: context and tensor parallelism, a rank for each of cp * tp.
--decode tp2 without --prefill is a colocated server: the decode pool computes its prompts itself.
a size is written 1GiB, 512MiB or 2000000000.
keys are read from the environment, too: BATON_API_KEYS (with commas between), BATON_API_KEY.
"""

NUMBERS = ("--threads-per-rank", "--max-model-len", "--block-size", "--port")
_Flag = tuple[str, str, str]  # its name, what is written behind it, help
GROUPS: tuple[tuple[str, tuple[_Flag, ...]], ...] = (
    (
        "the cluster",
        (
            ("--prefill", "POOL", "a ring that computes prompts; repeat for more"),
            ("--decode", "POOL", "a pool that answers; repeat for more"),
            ("--launcher", "local|ray", "processes here, or actors on a Ray cluster"),
            ("--device", "auto|cpu|cuda", "where ranks compute"),
            ("--transport", "auto|nixl|tcp", "how KV moves; auto is NIXL where it works"),
            ("--transfer-interface", "NAME", "between hosts; else the one that Ray's nodes use"),
            ("--threads-per-rank", "N", "CPU threads; else the cores are shared out"),
        ),
    ),
    (
        "the model and its KV",
        (
            ("--revision", "NAME", "of a model on the Hub: a branch, a tag or a commit"),
            ("--served-model-name", "NAME", "that requests give; several may follow one another"),
            ("--chat-template", "FILE", "instead of the checkpoint's"),
            ("--tool-call-parser", "NAME", "how calls of tools are written; auto: by the template"),
            ("--reasoning-parser", "NAME", "how reasoning is written; auto: by the template"),
            (
                "--default-chat-template-kwargs",
                "JSON",
                "given to the template where a request says nothing else",
            ),
            ("--generation-config", "auto|none", "whether its sampling values are the defaults"),
            ("--dtype", "auto|bfloat16|float16|float32", "of weights and KV; auto: the model's"),
            ("--max-model-len", "N", "tokens of prompt and answer; else what the model can"),
            ("--block-size", "TOKENS", "of a KV block"),
            (
                "--kv-memory",
                "SIZE",
                "of each rank's KV pool, or auto: a share of what its weights leave",
            ),
            ("--checksum", "off|sampled|always", "of KV on its way, verified on arrival"),
        ),
    ),
    (
        "documents, files and batches",
        (
            ("--data-dir", "DIR", "where they outlive a restart of everything"),
            ("--store-memory", "SIZE", "host memory for their KV"),
            ("--disk-quota", "SIZE", "of --data-dir, for their KV"),
            ("--disk-io", "vectored|nixl-posix|nixl-gds", "how that is read and written"),
        ),
    ),
    (
        "the server",
        (
            ("--host", "HOST", "to listen on; beyond this machine only with keys"),
            ("--allowed-host", "NAME", "another name of this server, where no key is asked for"),
            ("--cors-origin", "ORIGIN", "of pages that may use it, as https://NAME; repeat"),
            ("--port", "PORT", "0 is any free one"),
            ("--api-key", "KEY", "a tenant with a cache of its own; repeat for more; ps shows it"),
            ("--api-key-file", "FILE", "one key a line, # begins a comment; read when it changes"),
            ("--log-level", "LEVEL", "DEBUG, INFO, WARNING or ERROR"),
            ("--log-dir", "DIR", "one log file for each process; else they share stderr"),
        ),
    ),
)


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags. One that is not given does not occur in the namespace: a file may have it."""
    parser.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        help="a Hugging Face checkpoint folder, the name of one on the Hub (Qwen/Qwen3-4B), or "
        "arithmetic; without one the embedded model",
    )
    for title, flags in GROUPS:
        group = parser.add_argument_group(title)
        for flag, metavar, text in flags:
            default = getattr(ServeConfig(), flag[2:].replace("-", "_"))
            group.add_argument(
                flag,
                metavar=metavar,
                help=f"{text} (default {default})" if default not in (None, ()) else text,
                default=argparse.SUPPRESS,
                type=int if flag in NUMBERS else str,
                **_many(flag) if isinstance(default, tuple) else {},
            )
    other = parser.add_argument_group("everything else")
    other.add_argument(
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS,
        help="do not report at the start what is served, and how",
    )
    other.add_argument(
        "--config", metavar="FILE", default=None, help="a TOML file with the same names"
    )
    other.add_argument(
        "--set",
        action="append",
        dest="sets",
        metavar="TABLE.FIELD=VALUE",
        default=[],
        help="any field of any process, as prefill_pool.chunk_tokens=4096; "
        "baton config show --resolved has them all",
    )


def _many(flag: str) -> dict[str, Any]:
    """A flag that is repeated; of names, several may also follow it."""
    if flag == "--served-model-name":
        return {"action": "extend", "nargs": "+"}
    return {"action": "append"}
