"""Names of models: the listed id, what a request may call a model, and which names are safe on disk.

An id is the model's basename in lower case with hyphens for spaces. Where two models share a
basename, each is listed as org--name. A request may say the id, the full repository id, either in
any case and with spaces for hyphens, with Ollama's ":latest", or the id without its quantization
suffix where that names one model only; any of them behind Ollama's "library/", with or without its
registry. Everything here is a pure function.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from osaurus_grpc.errors import InvalidRequestError

DEFAULT_NAMES = frozenset({"", "default"})
MAX_PART_CHARS = 96

_LATEST = ":latest"
_LIBRARY = re.compile(r"(registry\.ollama\.ai/)?library/", re.IGNORECASE)
_QUANTIZATION_TOKEN = re.compile(
    r"""\d+(\.\d+)?bit | bit | b?fp?16 | fp?32 | fp8 | u?int[48] | mx ?fp[48] | nvfp4 | q\d\w*
    | dwq | awq | gptq | gguf | mlx | g\d+ | gs\d+""",
    re.VERBOSE,
)
_DATE_TOKEN = re.compile(r"\d{4,8}")
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_SAFE_PART = re.compile(r"\w[\w.+\- ]*")


def normalized(name: str) -> str:
    """A name as ids are compared: lower case, hyphens for white space, without ":latest"."""
    return re.sub(r"\s+", "-", name.strip().lower()).removesuffix(_LATEST)


def without_library(name: str) -> str:
    """A name without "library/": where Ollama keeps what has no namespace of its own.

    Its clients may write it before any name, and before it "registry.ollama.ai/", as its errors do.
    """
    found = _LIBRARY.match(name.strip())
    return name.strip()[found.end() :] if found else name


def basename_id(repo_id: str) -> str:
    """The id of a model whose basename is its own."""
    return normalized(repo_id.rpartition("/")[2])


def qualified_id(repo_id: str) -> str:
    """The id of a model that shares its basename: org--name, or the name where there is no org."""
    return normalized(repo_id.replace("/", "--"))


def assign_ids(repo_ids: Iterable[str]) -> dict[str, str]:
    """Give every repository id ("org/name" or "name") its unique listed id.

    Args:
        repo_ids: Distinct repository ids.

    Returns:
        Repository id to listed id. Depends on the set of repository ids only, not on its order.
    """
    ordered = sorted(set(repo_ids))
    shared = Counter(basename_id(repo_id) for repo_id in ordered)
    taken: set[str] = set()
    assigned: dict[str, str] = {}
    # Models that keep their basename come first, so that a qualified id never takes one away.
    for repo_id in sorted(ordered, key=lambda each: (shared[basename_id(each)] > 1, each)):
        base = basename_id(repo_id)
        wanted = base if shared[base] == 1 else qualified_id(repo_id)
        assigned[repo_id] = _untaken(wanted, taken)
        taken.add(assigned[repo_id])
    return assigned


def _untaken(wanted: str, taken: set[str]) -> str:
    """The wanted id, numbered where names that differ in case only would make it ambiguous."""
    candidate, number = wanted, 2
    while candidate in taken:
        candidate, number = f"{wanted}--{number}", number + 1
    return candidate


def without_quantization(model_id: str) -> str:
    """An id without what its end says about quantization ("-4bit", "-bf16", "-mlx-8bit", "-4bit-dwq")."""
    tokens = model_id.split("-")
    kept = len(tokens)
    while kept > 1 and _is_quantization(tokens, kept - 1):
        kept -= 1
    # A lone number before "bit" belongs to it: "-4-bit".
    if kept > 1 and tokens[kept:] and tokens[kept] == "bit" and tokens[kept - 1].isdigit():
        kept -= 1
    return "-".join(tokens[:kept])


def _is_quantization(tokens: list[str], index: int) -> bool:
    token = tokens[index]
    if _QUANTIZATION_TOKEN.fullmatch(token):
        return True
    # "…-4bit-dwq-053125": the date of the calibration.
    return bool(_DATE_TOKEN.fullmatch(token)) and tokens[index - 1] == "dwq"


def match(name: str, models: Mapping[str, str]) -> str | None:
    """Find the model that a name means, aliases and defaults aside.

    Args:
        name: As a request says it.
        models: Listed id to repository id.

    Returns:
        A listed id, or None where no model or more than one is meant.
    """
    wanted = normalized(name)
    if wanted in models:
        return wanted
    for rule in (normalized, qualified_id):
        found = [model_id for model_id, repo_id in models.items() if rule(repo_id) == wanted]
        if len(found) == 1:
            return found[0]
    found = [model_id for model_id in models if without_quantization(model_id) == wanted]
    return found[0] if len(found) == 1 else None


def resolve(
    name: str, models: Mapping[str, str], *, aliases: Mapping[str, str], default: str, fallback: str
) -> str | None:
    """Find the model that a request's name means.

    A model's own name wins over an alias of that name. An alias may name another alias; the
    default and the fallback may be aliases too.

    Args:
        name: As the request says it; "" and "default" mean the default model.
        models: Listed id to repository id.
        aliases: Further names and what they mean.
        default: The configured default model; "" is the only model, if there is one.
        fallback: What an unknown name means; "" is nothing.

    Returns:
        A listed id or None.
    """
    if normalized(name) in DEFAULT_NAMES:
        if normalized(default) in DEFAULT_NAMES:
            return next(iter(models)) if len(models) == 1 else None
        return _followed(default, models, aliases)
    if found := _followed(name, models, aliases):
        return found
    short = without_library(name)
    if short not in ("", name) and (found := _followed(short, models, aliases)):
        return found
    return _followed(fallback, models, aliases) if fallback else None


def _followed(name: str, models: Mapping[str, str], aliases: Mapping[str, str]) -> str | None:
    """Match a name, following aliases; a circle of aliases ends in None."""
    meanings = {normalized(alias): target for alias, target in aliases.items()}
    seen: set[str] = set()
    while True:
        found = match(name, models)
        key = normalized(name)
        if found is not None or key in seen or key not in meanings:
            return found
        seen.add(key)
        name = meanings[key]


def check_repo_id(name: str, *, field: str = "model") -> str:
    """Check that a name ("org/name" or "name") is safe as a folder below the models directory.

    Returns:
        The name, unchanged.

    Raises:
        InvalidRequestError: It could leave the directory, hide there, or not exist on every system.
    """
    parts = name.split("/")
    if len(parts) > 2 or not all(_is_safe(part) for part in parts):
        raise InvalidRequestError(
            "A model name is NAME or ORG/NAME, each of letters, digits, spaces and . _ - +, beginning with a "
            f"letter or digit and at most {MAX_PART_CHARS} characters long.",
            field=field,
        )
    return name


def safe_part(text: str) -> str:
    """The nearest safe name for a local file's or folder's name; "" where nothing of it is safe."""
    kept = re.sub(r"[^\w.+\- ]", "-", text).lstrip("._-+ ")[:MAX_PART_CHARS].rstrip(". ")
    return kept if _is_safe(kept) else ""


def _is_safe(part: str) -> bool:
    return (
        len(part) <= MAX_PART_CHARS
        and bool(_SAFE_PART.fullmatch(part))
        and not part.startswith("_")
        and not part.endswith((".", " "))
        and not _WINDOWS_DEVICE.fullmatch(part)
    )
