"""Recipe: a YAML file and `section.key=value` overrides become frozen models, or one list of every fault."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, WrapValidator, model_validator
from pydantic_core import ErrorDetails, PydanticUndefined

MAX_BYTES = 256 * 1024  # a recipe is a page; a larger file is not a recipe
MAX_DEPTH = 12
MAX_KEYS = 1000
NO_NUL = r"^[^\x00]+$"

# Settings that cannot change a weight: a run may go on under another value of these.
harmless = {"json_schema_extra": {"harmless": True}}


class InputError(ValueError):
    """The user's input is at fault: the command line prints the message alone and exits with 2."""


class Failure(RuntimeError):
    """Something beside the program failed (a disk, a shard, a checkpoint): the command line prints the message, exits 1."""


class Section(BaseModel):
    """One mapping of a recipe or a JSON file of ours: frozen, strict, unknown keys refused."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), validate_default=False
    )


class Choice:
    """Validates a mapping as the section that its `kind` names; `kinds()` lists what is installed."""

    def __init__(
        self, what: str, kinds: Callable[[], Mapping[str, Callable[[], type[Section]]]], default: str | None = None
    ) -> None:
        self.what, self.kinds, self.default = what, kinds, default

    def pick(self, values: object) -> type[Section]:
        """The section class for `values`; raises ValueError when there is none."""
        if isinstance(values, Section):
            return type(values)
        kinds = self.kinds()
        if not isinstance(values, dict):
            raise ValueError(f"must be a mapping with a `kind`, one of {', '.join(sorted(kinds))}")
        kind = values.get("kind", self.default)
        if kind is None:
            raise ValueError(f"needs a `kind`, one of {', '.join(sorted(kinds))}")
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"{kind!r} is not {self.what}{suggestion(str(kind), kinds)}")
        return kinds[kind]()

    def __call__(self, values: object, _: object) -> Section:
        return values if isinstance(values, Section) else self.pick(values).model_validate(values)


def installed(group: str, prefix: str, base: type[Section]) -> dict[str, Callable[[], type[Section]]]:
    """The sections that installed packages name in an entry point group, by what follows the prefix; each is imported when asked for."""
    return {
        entry.name.removeprefix(prefix): partial(_section, entry, base)
        for entry in entry_points(group=group)
        if entry.name.startswith(prefix)
    }


def _section(entry: EntryPoint, base: type[Section]) -> type[Section]:
    found = entry.load()
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"entry point {entry.name} = {entry.value}: not a {base.__name__}")
    return found


def suggestion(word: str, known: Mapping[str, object] | list[str]) -> str:
    """`; did you mean ...?` for the nearest known word, or the list of all."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(sorted(known))}"


MAX_SIDE = 8192
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Finite = Annotated[float, Field(strict=False, ge=-1e6, le=1e6)]


class TransformOptions(Section):
    """In this order: `size` sets the shorter side, `pad` mirrors a border, `crop` cuts out a square, `flip` turns half of them.

    `canvas` (height, width) is for images that differ in size: each lies at its upper left, and the rest is grey, in a mask ignored.

    Values become `range` (of 0 … 255), or are normalised by `mean` and `std` of a channel in 0 … 1, as pretrained networks want.
    """

    size: Side | None = None
    pad: Annotated[int, Field(ge=0, le=512)] = 0
    crop: Side | None = None
    crop_at: Literal["random", "centre"] = "random"
    flip: bool = False
    canvas: Annotated[tuple[Side, Side] | None, Field(strict=False)] = None
    range: Annotated[tuple[Finite, Finite], Field(strict=False)] = (-1.0, 1.0)
    mean: Annotated[tuple[Finite, ...] | None, Field(strict=False)] = None
    std: Annotated[tuple[Annotated[Finite, Field(gt=0)], ...] | None, Field(strict=False)] = None

    @model_validator(mode="after")
    def _makes_sense(self) -> TransformOptions:
        if self.range[0] >= self.range[1]:
            raise ValueError(f"`range` {list(self.range)}: the first value must be less than the second")
        if (self.mean is None) != (self.std is None):
            raise ValueError("`mean` and `std` come together")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"`mean` has {len(self.mean)} values and `std` {len(self.std)}; one a channel")
        if self.mean is not None and self.range != (-1.0, 1.0):
            raise ValueError("`range` has no effect beside `mean` and `std`; leave one out")
        if self.crop_at != "random" and self.crop is None:
            raise ValueError("`crop_at` has no effect without `crop`")
        if self.crop is not None and self.canvas is not None:
            raise ValueError("`canvas` has no effect beside `crop`, which makes all images one size; leave one out")
        return self

    def still(self) -> TransformOptions:
        """The same without what moves images at random: what a score or a comparison looks at."""
        crop_at = "random" if self.crop is None else "centre"  # the default has no effect without a crop
        return self.model_copy(update={"flip": False, "crop_at": crop_at})


class SubsetOptions(Section):
    """A subset of the split: so many samples of each class, or so many in all, chosen by `seed`, whatever seed the run has."""

    per_class: Annotated[int, Field(ge=1)] | None = None
    samples: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _says_how_many(self) -> SubsetOptions:
        if (self.per_class is None) == (self.samples is None):
            raise ValueError("needs one of `per_class`, so many samples of each class, and `samples`, so many in all")
        return self


class DataOptions(Section):
    """What is read, in which order: a dataset made by `gandist pack` or `gandist index`, here or behind a URL.

    With `reader: webdataset` the path names tars, with braces for many, and nothing is indexed. Unlabelled images are those of all samples,
    or those of the dataset at `unlabelled_path`.
    """

    path: Annotated[str, Field(min_length=1, pattern=NO_NUL, **harmless)]  # the dataset's digest is compared instead
    split: str = "train"
    reader: Literal["index", "webdataset"] = "index"
    shuffle: Literal["full", "window"] = "full"
    window_shards: Annotated[int, Field(ge=1, le=4096)] = 16
    transform: TransformOptions = TransformOptions()
    unlabelled_transform: TransformOptions | None = None
    unlabelled_path: Annotated[str, Field(min_length=1, pattern=NO_NUL, **harmless)] | None = None  # likewise
    unlabelled_split: str = "train"
    subset: SubsetOptions | None = None
    classes: Annotated[int, Field(ge=1, le=1_000_000)] | None = None  # of the labels, where no index counted them
    buffer: Annotated[int, Field(ge=1, le=1_000_000)] = 1000  # samples that the webdataset reader shuffles among
    workers: Annotated[int, Field(ge=0, le=64, **harmless)] = 2  # threads of each process; 0 reads when it is asked
    memory_gib: Annotated[float, Field(ge=0, strict=False, **harmless)] = 1.0  # of each process, for samples once read
    quarantine: Annotated[int, Field(ge=0, le=100_000, **harmless)] = 0  # damaged samples that a run may go on past
    cache: Annotated[str, Field(min_length=1, pattern=NO_NUL, **harmless)] | None = None  # folder for remote files
    cache_gib: Annotated[float, Field(gt=0, strict=False, **harmless)] = 64.0

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> DataOptions:
        # Of a resolved recipe all keys are given, so that only those with a value of their own count.
        given = {name for name, info in type(self).model_fields.items() if getattr(self, name) != info.default}
        if "window_shards" in given and self.shuffle != "window":
            raise ValueError("`window_shards` has no effect without `shuffle: window`")
        indexed, streamed = (
            {
                "split",
                "shuffle",
                "subset",
                "quarantine",
                "cache",
                "cache_gib",
                "memory_gib",
                "unlabelled_path",
                "unlabelled_split",
            },
            {"classes", "buffer"},
        )
        if "unlabelled_split" in given and self.unlabelled_path is None:
            raise ValueError("`unlabelled_split` has no effect without `unlabelled_path`; leave it out")
        if self.reader == "webdataset" and self.transform.canvas is not None:
            raise ValueError("`transform.canvas` needs `reader: index`; set `transform.crop` instead")
        if self.reader == "webdataset" and self.workers == 0:
            raise ValueError(
                "`workers` 0 has no effect with `reader: webdataset`, which streams in threads; use 1 or more"
            )
        for name in sorted((indexed if self.reader == "webdataset" else streamed) & given):
            raise ValueError(f"`{name}` has no effect with `reader: {self.reader}`")
        return self

    def unlabelled(self) -> DataOptions | None:
        """The section of the dataset that unlabelled images are of, where it is another one."""
        if self.unlabelled_path is None:
            return None
        moved = self.transform if self.unlabelled_transform is None else self.unlabelled_transform
        changes = {"path": self.unlabelled_path, "split": self.unlabelled_split, "transform": moved}
        none = {"subset": None, "unlabelled_path": None, "unlabelled_split": "train", "unlabelled_transform": None}
        return self.model_copy(update={**changes, **none})

    def labelled(self) -> DataOptions:
        """The same without what says anything of unlabelled images; settings of a cache that may be theirs go with them."""
        names = ["unlabelled_path", "unlabelled_split", "unlabelled_transform"]
        names += ["cache", "cache_gib"] if self.unlabelled_path is not None and "://" not in self.path else []
        return self.model_copy(update={name: type(self).model_fields[name].default for name in names})


class RunOptions(Section):
    """How long, how large and where; progress counts images."""

    folder: Annotated[str, Field(min_length=1, pattern=NO_NUL, **harmless)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    images: Annotated[int, Field(ge=1, lt=2**62, **harmless)]
    batch: Annotated[int, Field(ge=1, lt=2**31)]  # global: all processes and micro-batches together
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    accumulate: Annotated[int, Field(ge=1)] = 1  # micro-batches of each process
    compile: bool = False  # networks by torch.compile; another rounding
    graphs: Annotated[bool, Field(**harmless)] = True  # a GPU replays steps that it has recorded
    log_every: Annotated[int, Field(ge=1, **harmless)] = 50  # steps
    sample_images: Annotated[int | None, Field(ge=1, **harmless)] = None
    evaluate_images: Annotated[int | None, Field(ge=1, **harmless)] = None
    save_images: Annotated[int | None, Field(ge=1, **harmless)] = None
    keep_checkpoints: Annotated[int, Field(ge=1, **harmless)] = 2
    trackers: Annotated[tuple[Literal["wandb", "tensorboard"], ...], Field(strict=False, **harmless)] = ()

    @model_validator(mode="after")
    def _periods_make_sense(self) -> RunOptions:
        if self.images < self.batch:
            raise ValueError(
                f"`images` ({self.images}) is less than one `batch` ({self.batch}): nothing would be trained"
            )
        if self.batch % self.accumulate:
            raise ValueError(
                f"`batch` {self.batch} cannot be split into `accumulate` {self.accumulate} equal micro-batches; "
                f"use a multiple of {self.accumulate}"
            )
        return self


class Recipe(Section):
    """The whole experiment."""

    data: DataOptions
    game: SerializeAsAny[Section]
    run: RunOptions

    def to_yaml(self) -> str:
        """The resolved recipe: every key, defaults included, in the order of the models."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def decisive(self) -> dict[str, Any]:
        """Dotted keys and values of all that decides the result; a run goes on only where these are equal."""
        return {name: value for name, value, _ in _decisive(self, "")}

    def defaults(self) -> dict[str, Any]:
        """Likewise, of those that have a default, the default."""
        return {name: default for name, _, default in _decisive(self, "") if default is not PydanticUndefined}


def _decisive(section: Section, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("harmless"):
            continue
        if isinstance(value, Section):
            yield from _decisive(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, info.get_default()


@dataclass
class Source:
    """A parsed recipe before validation: plain values, where each key stood, and the faults found so far."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[tuple[str, ...], str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def fault(self, location: tuple[str | int, ...], message: str) -> None:
        """Notes a fault of the key at `location` with the line or override that set it."""
        keys = tuple(str(part) for part in location)
        place = next((self.places[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in self.places), "")
        # A fault of a whole section may lie in what overrides put into it.
        below = [p for known, p in self.places.items() if known[: len(keys)] == keys and known != keys]
        place = " with ".join(dict.fromkeys([place, *(p for p in below if p.startswith("override"))]))
        name = ".".join(key if len(key) <= 80 else key[:80] + "…" for key in keys)
        self.faults.append(": ".join(part for part in (place, f"`{name}`" if name else "", message) if part))

    def refuse_faults(self) -> None:
        """Raises one InputError that lists all faults, if there are any."""
        if self.faults:
            count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
            lines = [re.match(r"line (\d+)", fault) for fault in self.faults]
            order = sorted(range(len(lines)), key=lambda i: int(m[1]) if (m := lines[i]) else len(lines) + MAX_BYTES)
            raise InputError("\n".join([f"{self.name}: {count}", *(f"  {self.faults[i]}" for i in order)]))


# YAML 1.2's core schema: 1e-4 is a number (YAML 1.1 reads a string), `no` and `on` are words, 010 is not octal.
_NUMBER = re.compile(r"[-+]?(\d+(_\d+)*)(\.\d*)?([eE][-+]?\d+)?|[-+]?\.\d+([eE][-+]?\d+)?")
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False, ".nan": math.nan, ".inf": math.inf}


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    if node.style in ("'", '"', "|", ">"):
        return text
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if _NUMBER.fullmatch(text) and len(text) < 40:
        number = float(text.replace("_", ""))
        return number if re.search(r"[.eE]", text) else int(text.replace("_", ""))
    return text


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def parse(text: str, source: Source, at: tuple[str, ...] = (), place: str | None = None) -> Any:
    """Plain values of a YAML text; tags, anchors, aliases, duplicate keys and deep nesting become faults.

    Nothing is constructed but mappings, lists, text, numbers, booleans and null.
    """
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            where = place or f"line {_line(event)}"
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                source.faults.append(f"{where}: nested deeper than {MAX_DEPTH} levels")
                return None
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                source.faults.append(f"{where}: anchors and aliases are not allowed; write the value out")
                return None
            tag = getattr(event, "tag", None)
            if tag:
                source.faults.append(f"{where}: the tag {tag!r} is not allowed; a recipe holds plain values")
                return None
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = place or (f"line {mark.line + 1}" if mark else "")
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        source.faults.append(f"{where}: not YAML: {problem}".lstrip(": "))
        return None
    return _plain(node, source, at, place) if node is not None else None


def _plain(node: yaml.Node, source: Source, at: tuple[str, ...], place: str | None) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, source, (*at, str(i)), place) for i, item in enumerate(node.value)]
    values: dict[str, Any] = {}
    assert isinstance(node, yaml.MappingNode)
    for key_node, value_node in node.value:
        line = f"line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            source.faults.append(f"{place or line}: a key must be a word")
            continue
        key, here = key_node.value, (*at, key_node.value)
        if key in values:
            source.faults.append(
                f"{place or line}: `{'.'.join(here)}`: stands twice; the first is on {source.places[here]}"
            )
            continue
        if len(source.places) >= MAX_KEYS:
            source.faults.append(f"{place or line}: more than {MAX_KEYS} keys; a recipe is a page")
            break
        source.places[here] = place or line
        values[key] = _plain(value_node, source, here, place)
    return values


def _override(source: Source, text: str) -> None:
    name, equals, value = text.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(re.fullmatch(r"\w+", key) for key in keys):
        source.faults.append(f"override {text[:80]!r}: must read section.key=value")
        return
    shown = text if len(text) <= 80 else text[:80] + "…"
    place = f"override {shown!r}"
    parsed = parse(value, source, keys, place)
    values = source.values
    for key in keys[:-1]:
        if not isinstance(values.setdefault(key, {}), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = parsed
    for known in [known for known in source.places if known[: len(keys)] == keys and len(known) > len(keys)]:
        if source.places[known] != place:
            del source.places[known]
    source.places[keys] = place


_WORDING = {
    "missing": "is required",
    "int_type": "must be a whole number, not {input!r}",
    "int_from_float": "must be a whole number, not {input!r}",
    "float_type": "must be a number, not {input!r}",
    "bool_type": "must be true or false, not {input!r}",
    "string_type": "must be text, not {input!r}",
    "model_type": "must be a mapping of keys, not {input!r}",
    "tuple_type": "must be a list, not {input!r}",
    "list_type": "must be a list, not {input!r}",
    "dict_type": "must be a mapping of keys, not {input!r}",
    "none_required": "must be null, not {input!r}",
    "too_long": "may have {max_length} of them, not {actual_length}",
    "string_too_long": "may have {max_length} characters",
    "multiple_of": "must be a multiple of {multiple_of}, not {input!r}",
    "finite_number": "must be a finite number, not {input!r}",
    "greater_than_equal": "must be at least {ge}, not {input!r}",
    "greater_than": "must be greater than {gt}, not {input!r}",
    "less_than_equal": "must be at most {le}, not {input!r}",
    "less_than": "must be less than {lt}, not {input!r}",
    "literal_error": "must be {expected}, not {input!r}",
    "string_too_short": "must not be empty",
    "too_short": "needs at least {min_length} of them",
    "string_pattern_mismatch": "must not hold a NUL byte",
}


def wording(error: ErrorDetails) -> str:
    """One plain sentence for a pydantic error."""
    template = _WORDING.get(error["type"])
    given = error.get("input")
    shown = given if not isinstance(given, str) or len(given) <= 80 else given[:80] + "…"
    if template:
        return template.format(input=shown, **error.get("ctx", {}))
    return error["msg"].removeprefix("Value error, ")


def section_at(model: type[Section], location: tuple[str | int, ...], values: Any) -> type[Section]:
    """The section class that `location` lies in, following the `kind` that `values` name."""
    for part in location:
        values = values.get(part) if isinstance(values, dict) else None
        info = model.model_fields[str(part)]
        within = [*info.metadata, *(m for one in get_args(info.annotation) for m in getattr(one, "__metadata__", ()))]
        choice = next((m.func for m in within if isinstance(m, WrapValidator)), None)
        if isinstance(choice, Choice):
            model = choice.pick(values)
        else:
            candidates = [info.annotation, *getattr(info.annotation, "__args__", ())]
            model = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
    return model


def _validate(source: Source, name: str, model: type[Section]) -> Section | None:
    """One section of `source`, or None with its faults noted."""
    if name not in source.values:
        source.fault((name,), "the section is missing")
        return None
    values = source.values[name]
    try:
        return model.model_validate(values)
    except ValidationError as error:
        for entry in error.errors():
            location = entry["loc"]
            if entry["type"] == "extra_forbidden":
                fields = [*section_at(model, location[:-1], values).model_fields]
                source.fault((name, *location), f"unknown key{suggestion(str(location[-1]), fields)}")
            else:
                source.fault((name, *location), wording(entry))
        return None


Check = Callable[["Source", DataOptions | None, Any, RunOptions | None], None]


def load(path: Path, overrides: list[str], games: Choice, check: Check) -> Recipe:
    """The recipe of a YAML file with overrides applied.

    `check` gets the sections that are sound, None for the others, and notes what contradicts the data or the machine.
    Raises InputError with every fault of the file and the overrides at once. Runs no code that the file names.
    """
    source = Source(str(path))
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)  # whatever it says of its size: a device says 0
        if len(raw) > MAX_BYTES:
            raise InputError(f"{path}: is too long for a recipe; the limit is {MAX_BYTES} bytes")
        text = raw.decode("utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; name a recipe (see configs/; that of a run is RUN/recipe.yaml)"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text at byte {error.start}; a recipe is a YAML file") from None
    values = parse(text, source)
    if not isinstance(values, dict):
        if not source.faults:
            source.faults.append("a recipe is a mapping with the sections data, game and run")
        source.refuse_faults()
    source.values = values
    for override in overrides:
        _override(source, override)
    for name in [name for name in source.values if name not in Recipe.model_fields]:
        source.fault((name,), f"unknown section{suggestion(name, list(Recipe.model_fields))}")

    data = _validate(source, "data", DataOptions)
    game = None
    try:
        game = _validate(source, "game", games.pick(source.values.get("game", {})))
    except ValueError as error:
        source.fault(("game",), str(error) if "game" in source.values else "the section is missing")
    run = _validate(source, "run", RunOptions)
    assert isinstance(data, DataOptions | None)
    assert isinstance(run, RunOptions | None)
    check(source, data, game, run)
    source.refuse_faults()
    assert data is not None
    assert game is not None
    assert run is not None
    return Recipe.model_construct(data=data, game=game, run=run)
