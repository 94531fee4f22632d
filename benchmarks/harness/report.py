"""What a benchmark's run reports: rows, the noise of the machine, and how they print."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch

from cvkernels.tables import text_table

SCHEMA = 2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUANTISED = {"int8": torch.int8}  # of networks alone
# What computes the peers; a variant of ours tells by itself.
PEERS = {
    "eager": "aten",
    "compile": "inductor",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt",
}
# What each column of speed-ups is over: the first of these variants that was timed.
BASELINES = {
    "vs_eager": ("eager", "eager channels_last"),
    "vs_compile": ("compile",),
    "vs_freezing": ("compile freezing",),
}
TOO_NOISY = 0.05


def column(title: str, form: str) -> Any:
    """A field that is None until it is measured, with its title and format in a printed table."""
    return field(default=None, metadata={"title": title, "form": form})


@dataclass
class Row:
    """One variant of one case. Times are per call; a share is a fraction of the measured rate.

    status: "measured"; "unavailable", where a peer or backend cannot run; "wrong" or "failed",
        which are bugs. ``note`` says why. "pending" until then: a report holds no such row.
    again: time of the variant's second measurement in the same rounds over that of the first.
    drift: ``vs_eager`` in the second half of the rounds over that in the first.
    eager_error: the reference's, beside ``max_error``: both are largest differences from float64.
    first_batch_s: until a network's first result, compilation and export included.
    kept_bytes, peak_bytes: resident memory that making the variant and its first call added, and
        that a later call added while it ran.
    saved_bytes: what a training step keeps for its backward, per image.
    decibels, top1: of answers that are quantised, the signal-to-noise ratio beside float64's, and
        the share of images whose largest logit is where float64 has it.
    """

    op: str
    part: str
    case: str
    shape: str
    dtype: str
    variant: str
    backend: str = ""
    status: str = "pending"
    time_us: float | None = column("us", "{:.1f}")
    p20_us: float | None = column("p20", "{:.1f}")
    p80_us: float | None = column("p80", "{:.1f}")
    samples: int = 0
    bytes: int | None = None
    flops: int | None = None
    gb_per_s: float | None = column("GB/s", "{:.1f}")
    copy_share: float | None = column("% copy", "{:.0%}")
    tflop_per_s: float | None = column("TFLOP/s", "{:.3f}")
    matrix_share: float | None = column("% matrix", "{:.0%}")
    bound_share: float | None = column("% bound", "{:.0%}")
    vs_eager: float | None = column("vs eager", "{:.2f}x")
    vs_compile: float | None = column("vs compile", "{:.2f}x")
    vs_freezing: float | None = column("vs freezing", "{:.2f}x")
    max_error: float | None = column("max error", "{:.1e}")
    eager_error: float | None = column("eager's", "{:.1e}")
    decibels: float | None = column("dB", "{:.1f}")
    top1: float | None = column("top-1", "{:.1%}")
    first_batch_s: float | None = column("s to first", "{:.2f}")
    peak_bytes: int | None = column("peak bytes", "{:.2e}")
    kept_bytes: int | None = column("kept bytes", "{:.2e}")
    saved_bytes: float | None = column("saved bytes/image", "{:.2e}")
    again: float | None = None
    drift: float | None = None
    note: str = ""

    @property
    def peer(self) -> str | None:
        """What computes it, if it is not ours."""
        return PEERS.get(self.variant.split()[0])


class Rates(NamedTuple):
    """What the device does at its best in one dtype, measured in the same run."""

    copy_gb_per_s: float
    matrix_tflop_per_s: float


class Timing(NamedTuple):
    median: float
    p20: float
    p80: float


def summarize(samples: Sequence[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0])
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), p20, p80)


class Noise(NamedTuple):
    """By how much a variant's two medians differ, as a fraction, over the cases.

    spread: p80 - p20 over the median, of the median row.
    drift: by how much the speed-ups over eager differ between the two halves of the rounds, which
        are two runs of half the length; geometric mean over the rows.
    """

    cases: int
    median: float
    p80: float
    worst: float
    spread: float
    drift: float

    @property
    def too_noisy(self) -> bool:
        return self.p80 > TOO_NOISY or self.drift > TOO_NOISY

    def __str__(self) -> str:
        verdict = "quiet enough"
        if self.too_noisy:
            verdict = f"THE MACHINE IS TOO NOISY: over {TOO_NOISY:.0%}"
        return (
            f"A/A over {self.cases} cases: one variant timed twice differs by {self.median:.1%} in "
            f"the median, {self.p80:.1%} at p80, {self.worst:.1%} at worst; p20 to p80 of a row "
            f"spans {self.spread:.1%}; speed-ups of the first and second half of the rounds differ "
            f"by {self.drift:.1%} (geomean): {verdict}"
        )


@dataclass
class Report:
    """What one run measured, and where; prints as a table."""

    environment: dict[str, Any]
    rates: dict[str, Rates] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    complete: bool = True

    @property
    def noise(self) -> Noise | None:
        differences = [abs(math.log(row.again)) for row in self.rows if row.again]
        if not differences:
            return None
        timed = [row for row in self.rows if row.time_us]
        spread = statistics.median((row.p80_us - row.p20_us) / row.time_us for row in timed)
        median, _, p80 = summarize(differences)
        drifts = [abs(math.log(row.drift)) for row in timed if row.drift]
        drift = math.expm1(statistics.fmean(drifts)) if drifts else 0.0
        return Noise(len(differences), median, p80, max(differences), spread, drift)

    @property
    def sound(self) -> bool:
        """Whether no variant of ours was wrong or failed."""
        return not any(row.status in ("wrong", "failed") for row in self.rows if not row.peer)

    def as_dict(self) -> dict[str, Any]:
        noise = self.noise
        return {
            "schema": SCHEMA,
            "complete": self.complete,
            "environment": self.environment,
            "rates": {name: rates._asdict() for name, rates in self.rates.items()},
            "noise": noise and {**noise._asdict(), "too_noisy": noise.too_noisy},
            "rows": [asdict(row) for row in self.rows],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Report:
        """The report that :meth:`as_dict` gave.

        Raises:
            ValueError: another version of the benchmarks wrote it.
        """
        if content.get("schema") != SCHEMA:
            raise ValueError(
                f"results of schema {content.get('schema')}, expected {SCHEMA}; measure them again"
            )
        rates = {name: Rates(**values) for name, values in content["rates"].items()}
        rows = [Row(**row) for row in content["rows"]]
        return cls(content["environment"], rates, rows, content["complete"])

    def __str__(self) -> str:
        lines = [" | ".join(f"{key} {value}" for key, value in self.environment.items())]
        lines += [
            f"{name}: copy {copy:.1f} GB/s, matrix {matrix:.3g} TFLOP/s"
            for name, (copy, matrix) in self.rates.items()
        ]
        lines += [_table(self.rows)] if self.rows else ["nothing was measured"]
        lines += [] if self.noise is None else [str(self.noise)]
        lines += [] if self.complete else ["interrupted: this is what was measured"]
        return "\n".join(lines)


def _table(rows: Sequence[Row]) -> str:
    columns = [f for f in fields(Row) if f.metadata]
    used = [f for f in columns if any(getattr(row, f.name) is not None for row in rows)]
    titles = [f.metadata["title"].rjust(8) for f in used]
    header = ["op", "case", "shape", "dtype", "variant", "backend", *titles, "note"]
    lines = []
    for row in rows:
        op = row.op if row.part == "forward" else f"{row.op} {row.part}"
        note = row.note if row.status == "measured" else f"{row.status}: {row.note}"
        cells = [_cell(getattr(row, f.name), f.metadata["form"]) for f in used]
        lines.append([op, row.case, row.shape, row.dtype, row.variant, row.backend, *cells, note])
    return text_table(header, lines)


def _cell(value: float | None, form: str) -> str:
    # Padded here: text_table puts a column with an empty cell to the left.
    return ("" if value is None else form.format(value)).rjust(8)


def dtype_name(dtype: torch.dtype) -> str:
    named = DTYPES | QUANTISED
    return next((name for name, known in named.items() if known == dtype), str(dtype)[6:])
