"""The `dft:*` metrics of an API process, with vLLM's own labels `model_name` and `engine`.

With several API server processes, prometheus_client's multiprocess mode (which vLLM sets up) sums
them; each event is counted in one process only.
"""

from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Histogram

from dftserve.sampling.slots import AFTER, BEFORE, CHANGED, TEMPERATURE
from dftserve_vllm import engine
from dftserve_vllm.request_context import ChoiceStatistics, generates, is_first
from dftserve_vllm.step_report import Payload

NATS = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12)
TEMPERATURES = (0.25, 0.5, 0.75, 1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
PER_ENGINE = ("model_name", "engine")


class Metrics:
    """The metrics of one process, registered with prometheus_client."""

    def __init__(self) -> None:
        self.requests = Counter(
            "dft:requests", "Requests with an active diversity.", ["model_name", "law"]
        )
        self.styled = Counter(
            "dft:styled_requests", "Requests with an active style.", ["model_name", "style"]
        )
        self.refused = Counter(
            "dft:requests_refused",
            "Requests answered with 400 or 413 because of their diversity or style.",
            ["model_name"],
        )
        self.clamped = Counter(
            "dft:requests_clamped",
            "Requests whose diversity or style was lowered to the operator's caps.",
            ["model_name"],
        )
        self.audit_lost = Counter(
            "dft:audit_lost", "Lines that could not be written to the audit log.", ["model_name"]
        )
        self.unavailable = Counter(
            "dft:statistics_unavailable",
            "Choices that ended without statistics from the engine.",
            ["model_name"],
        )
        self.tokens = Counter(
            "dft:tokens", "Tokens sampled with an active diversity or style.", PER_ENGINE
        )
        self.faults = Counter(
            "dft:faults", "Faults of the plug-in in a worker; rows passed unchanged.", PER_ENGINE
        )
        self.nan_rows = Counter(
            "dft:nan_rows", "Rows passed through: NaN or nothing finite.", PER_ENGINE
        )
        self.before = Histogram(
            "dft:entropy_before_nats",
            "A choice's mean entropy before.",
            PER_ENGINE,
            buckets=NATS,
        )
        self.after = Histogram(
            "dft:entropy_after_nats", "A choice's mean entropy after.", PER_ENGINE, buckets=NATS
        )
        self.temperature = Histogram(
            "dft:temperature", "A choice's mean temperature.", PER_ENGINE, buckets=TEMPERATURES
        )
        self.changed = Histogram(
            "dft:tokens_changed",
            "The share of a choice's tokens that the new temperature changed.",
            PER_ENGINE,
            buckets=SHARES,
        )

        # Create every series at 0: Prometheus sees no increase in the first value of a counter.
        for index in range(engine.engines()):
            self.count_engine({"engine": index})
        for counter in (self.refused, self.clamped, self.unavailable, self.audit_lost):
            if engine.engines():
                counter.labels(engine.served_model_name())

    def count_request(self, law: str) -> None:
        self._count(self.requests, law)

    def count_style(self, name: str) -> None:
        self._count(self.styled, name)

    def count_refusal(self) -> None:
        self._count(self.refused)

    def count_clamped(self) -> None:
        self._count(self.clamped)

    def _count(self, counter: Counter, *labels: str) -> None:
        """Count an HTTP request that generates tokens, once per set of labels, however many prompts
        its body has."""
        if generates() and is_first(counter, *labels):
            counter.labels(engine.served_model_name(), *labels).inc()

    def count_lost_audit(self) -> None:
        self.audit_lost.labels(engine.served_model_name()).inc()

    def count_engine(self, payload: Payload) -> None:
        """Add the increase of an engine's counts."""
        labels = engine.served_model_name(), str(payload["engine"])
        self.faults.labels(*labels).inc(payload.get("faults", 0))
        self.nan_rows.labels(*labels).inc(payload.get("nan_rows", 0))

    def count_choice(self, choice: ChoiceStatistics) -> None:
        """A choice that has ended."""
        values = choice.means()
        if choice.payload is None or values is None:
            self.unavailable.labels(engine.served_model_name()).inc()
            return
        labels = engine.served_model_name(), str(choice.payload["engine"])
        self.tokens.labels(*labels).inc(values[0])
        self.before.labels(*labels).observe(values[BEFORE])
        self.after.labels(*labels).observe(values[AFTER])
        self.temperature.labels(*labels).observe(values[TEMPERATURE])
        self.changed.labels(*labels).observe(values[CHANGED])


@lru_cache
def metrics() -> Metrics:
    """Created on first use: the registry refuses a second set with the same names."""
    return Metrics()


def totals() -> dict[str, int]:
    """`faults` and `nan_rows` of all engines, as reported to any API process so far."""
    metrics()
    names = {"dft:faults_total": "faults", "dft:nan_rows_total": "nan_rows"}
    sums = dict.fromkeys(names.values(), 0)
    for family in _registry().collect():
        for sample in family.samples:
            if sample.name in names:
                sums[names[sample.name]] += int(sample.value)
    return sums


def _registry() -> CollectorRegistry:
    """The registry behind /metrics."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return get_prometheus_registry()
