"""The figures of a diagnosis, and the verdict that plain rules draw from them.

Letters: N examples, D coordinates of z.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

ERRORS = 2  # standard errors by which a figure must stand out from 0
ERRORS_OF_MANY = 3  # the same for each of D figures, some of which stray further by chance
LEAST = 0.1  # nats, of mutual information and of the rise when codes are exchanged, to speak of
LEAST_OF_DIMENSION = 0.01  # nats, of the rise when one coordinate is exchanged
ACTIVE = 0.01  # variance of a coordinate's posterior mean, as active units are counted
CAP_MARGIN = 1.0  # nats below log N from which on the estimate of the mutual information is taken to be capped
HOLE = 1.0  # nats of KL(q(z) ‖ p(z)) from which on the prior is said to miss the codes

RULES = (
    f"There is information where I(x; z) is ≥ {LEAST:g} nats and more than {ERRORS} standard errors above 0; the "
    f"decoder uses z where exchanging codes costs ≥ {LEAST:g} nats and more than {ERRORS} standard errors.",
    "Collapsed: no information, and the decoder does not use z. Ignored: information, but the decoder does not use z.",
    f"A dimension is active where its posterior mean varies over the examples by more than {ACTIVE:g} (variance); it "
    f"is used where exchanging it alone costs ≥ {LEAST_OF_DIMENSION:g} nats and more than {ERRORS_OF_MANY} standard "
    "errors. One that is active or used carries information.",
    "Otherwise: not collapsed where all dimensions carry information, partly collapsed where some do not.",
    f"I(x; z) is at its cap where it is within {CAP_MARGIN:g} nat of log N; it is then only a lower bound, and "
    "KL(q(z) ‖ p(z)), its complement to the whole KL, only an upper bound.",
    f"The prior misses the codes where KL(q(z) ‖ p(z)) is > {HOLE:g} nat by more than {ERRORS} standard errors and "
    "I(x; z) is below its cap, or where the noise contrastive prior is that much closer to the codes.",
)


@dataclass(frozen=True)
class Estimate:
    """A figure in nats, its standard error over examples, and a sentence on how it was computed."""

    value: float
    standard_error: float
    protocol: str

    def above(self, least: float) -> bool:
        """Whether it is more than `least` by ERRORS standard errors."""
        return self.value > least + ERRORS * self.standard_error

    def to_speak_of(self) -> bool:
        """Whether it is at least LEAST and stands out from 0."""
        return self.value >= LEAST and self.above(0.0)

    def rounded(self) -> tuple[str, str]:
        """Value and error with as many digits as show two of the error, 2 … 4 after the point."""
        error = self.standard_error
        digits = 2 if not 0 < error < math.inf else max(2, min(4, 1 - math.floor(math.log10(error))))
        return nats(self.value, digits), nats(error, digits)

    def __str__(self) -> str:
        return "{} ± {} nats".format(*self.rounded())


@dataclass(frozen=True)
class Diagnosis:
    """What the code of a VAE holds of its examples, and what the decoder makes of it; nats.

    Attributes:
        num_examples: N held-out examples behind the figures of the posteriors.
        num_decoded: examples behind those of the decoder.
        seed: of all draws.
        log_n: log N, the largest value that `mutual_information` can have.
        kl: mean KL(q(z|x) ‖ p(z)), the KL term of the ELBO; mutual information and marginal KL sum to it on average.
        mutual_information: I(x; z) by log q(z|x) − log q(z), q(z) over the N examples.
        marginal_kl: KL(q(z) ‖ p(z)).
        reconstruction: −log p(x|z), z ~ q(z|x).
        rise: how much more that is with another example's code.
        kl_per_dimension: [D].
        variances: [D], of the posterior means over the examples.
        rises: [D], of −log p(x|z) where one coordinate is another example's.
        rise_errors: [D], their standard errors.
        info_nce: InfoNCE's lower bound on I(x; z) by the run's own critic; None without one.
        info_nce_cap: the log K that it cannot exceed; None likewise.
        prior_gain: how much closer the noise contrastive prior is to the codes, KL(q(z) ‖ p(z)) − KL(q(z) ‖ p_NCP(z)),
            by a bound from below; None without one.
    """

    num_examples: int
    num_decoded: int
    seed: int
    log_n: float
    kl: Estimate
    mutual_information: Estimate
    marginal_kl: Estimate
    reconstruction: Estimate
    rise: Estimate
    kl_per_dimension: tuple[float, ...]
    variances: tuple[float, ...]
    rises: tuple[float, ...]
    rise_errors: tuple[float, ...]
    info_nce: Estimate | None = None
    info_nce_cap: float | None = None
    prior_gain: Estimate | None = None

    def __post_init__(self) -> None:
        for name in ("kl", "mutual_information", "marginal_kl", "reconstruction", "rise"):
            if not isinstance(getattr(self, name), Estimate):
                raise TypeError(f"Diagnosis: {name} must be an Estimate, got {type(getattr(self, name)).__name__}")
        lengths = [len(part) for part in (self.kl_per_dimension, self.variances, self.rises, self.rise_errors)]
        if lengths[0] == 0 or len(set(lengths)) > 1:
            raise ValueError(f"Diagnosis: figures per dimension must be [D] with one D ≥ 1, got lengths {lengths}")

    @property
    def active(self) -> tuple[bool, ...]:
        """[D], whether the posterior mean varies over the examples (Burda et al., 2016)."""
        return tuple(variance > ACTIVE for variance in self.variances)

    @property
    def used(self) -> tuple[bool, ...]:
        """[D], whether the decoder loses something where another example's coordinate takes the place of its own."""
        pairs = zip(self.rises, self.rise_errors, strict=True)
        return tuple(rise >= LEAST_OF_DIMENSION and rise > ERRORS_OF_MANY * error for rise, error in pairs)

    @property
    def carrying(self) -> tuple[bool, ...]:
        """[D], active or used."""
        return tuple(active or used for active, used in zip(self.active, self.used, strict=True))

    @property
    def capped(self) -> bool:
        """Whether the mutual information is so near log N that it is a lower bound only."""
        return self.mutual_information.value > max(self.log_n - CAP_MARGIN, LEAST)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Diagnosis":
        """Of what `dataclasses.asdict` gave, also by way of JSON.

        Raises:
            ValueError: where fields are missing, unknown, or no figures.
        """
        try:
            known = {field.name for field in fields(cls)}
            if values.keys() != known:
                raise ValueError(f"fields must be {', '.join(sorted(known))}, got {', '.join(sorted(values))}")
            return cls(**{name: _read(value) for name, value in values.items()})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not the figures of a diagnosis: {error}") from error


@dataclass(frozen=True)
class Verdict:
    """What the figures say.

    Attributes:
        kind: "collapsed", "ignored" (the code holds information that the decoder does not use), "partly collapsed" or
            "not collapsed".
        headline: a sentence.
        findings: sentences on each of the questions asked.
        advice: what the package offers to change it; empty where there is nothing to mend.
    """

    kind: Literal["collapsed", "ignored", "partly collapsed", "not collapsed"]
    headline: str
    findings: tuple[str, ...]
    advice: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.headline, *self.findings, *self.advice))


def judge(d: Diagnosis) -> Verdict:
    """The verdict by RULES."""
    kind, headline = _kind(d)
    hole, findings = _prior(d)
    return Verdict(
        kind, headline, (_information(d), *_decoder(d), *_critic(d), *findings), (*_remedies(d, kind), *hole)
    )


def _kind(d: Diagnosis) -> tuple[Literal["collapsed", "ignored", "partly collapsed", "not collapsed"], str]:
    informative, used = d.mutual_information.to_speak_of(), d.rise.to_speak_of()
    count, dimensions = sum(d.carrying), len(d.carrying)
    if not used and not informative:
        return (
            "collapsed",
            "Collapsed: the code says next to nothing about x, and the decoder is as well off with another example's.",
        )
    if not used:
        return "ignored", "Ignored: the code holds information about x, and the decoder makes next to no use of it."
    if count == dimensions:
        every = "the one dimension of z carries" if dimensions == 1 else f"all {dimensions} dimensions of z carry"
        return "not collapsed", f"Not collapsed: {every} information about x."
    if count == 0:
        return "partly collapsed", "Partly collapsed: the decoder uses z, but no single dimension shows it."
    which = "" if count > 8 else f" ({dimension_list(d.carrying)})"
    carry = "carries" if count == 1 else "carry"
    return "partly collapsed", f"Partly collapsed: {count} of {dimensions} dimensions{which} {carry} information."


def _information(d: Diagnosis) -> str:
    text = f"I(x; z) = {d.mutual_information} of a KL term of {nats(d.kl.value)}"
    if d.capped:
        return (
            f"{text}, and {d.num_examples:,} examples cannot show more than log N = {nats(d.log_n)}: it is at its cap, "
            "so z holds at least about that much."
        )
    return f"{text}, below its cap log N = {nats(d.log_n)}."


def _decoder(d: Diagnosis) -> list[str]:
    found = [f"Exchanging codes between examples costs {d.rise} of reconstruction ({nats(d.reconstruction.value)})."]
    idle = tuple(active and not used for active, used in zip(d.active, d.used, strict=True))
    if any(idle) and d.rise.to_speak_of():
        found.append(f"Active, yet of no measurable use to the decoder: dimensions {dimension_list(idle)}.")
    return found


def _critic(d: Diagnosis) -> list[str]:
    if d.info_nce is None or d.info_nce_cap is None:
        return []
    return [f"By the run's critic I(x; z) ≥ {d.info_nce}, where it can show at most {nats(d.info_nce_cap)}."]


def _prior(d: Diagnosis) -> tuple[tuple[str, ...], list[str]]:
    """Advice on the prior, and what was found."""
    relation = "≤" if d.capped else "="
    found = [f"KL(q(z) ‖ p(z)) {relation} {d.marginal_kl}."]
    gain = d.prior_gain
    if d.capped:
        found.append("With I(x; z) at its cap that bound does not tell a prior hole from too few examples.")
    if gain is not None:
        found.append(f"The run's noise contrastive prior is closer to the codes than p(z) by at least {gain}.")
        if gain.above(HOLE):
            found.append("By that much p(z) misses them: sample from the noise contrastive prior.")
        return (), found
    if d.marginal_kl.above(HOLE) and not d.capped:
        found.append("The prior misses the codes, so samples from it will suffer.")
        return ("Fit a noise contrastive prior: ncpvae fit-prior RUN.",), found
    if d.capped:
        return ("ncpvae fit-prior RUN measures how far the prior misses the codes, and mends it.",), found
    return (), found


def _remedies(d: Diagnosis, kind: str) -> tuple[str, ...]:
    if kind == "collapsed":
        return (
            "Train with --critic.kind hybrid (or self, neural), --remedies.free-bits 4, --remedies.annealing cyclical "
            "or --remedies.aggressive-steps 2000; or with a decoder that models less of x by itself.",
        )
    if kind == "ignored":
        return (
            "A critic alone keeps information in z without making the decoder use it: weaken the decoder, or give it "
            "time to learn to with --remedies.annealing cyclical.",
        )
    if kind == "partly collapsed":
        return (
            "Idle dimensions are no fault in themselves: the ELBO leaves alone what it does not need. If the code "
            "should hold more, --critic.kind hybrid, --remedies.free-bits or --remedies.annealing cyclical help.",
        )
    return ()


def dimension_list(chosen: tuple[bool, ...]) -> str:
    """The chosen coordinates, counted from 0, in words: "0, 3 and 12"."""
    numbers = [str(number) for number, wanted in enumerate(chosen) if wanted]
    return " and ".join(filter(None, [", ".join(numbers[:-1]), *numbers[-1:]]))


def nats(value: float, digits: int = 2) -> str:
    """With so many digits after the point, a true minus sign, and no minus before zero."""
    text = f"{value:.{digits}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "−")


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return Estimate(**value)
    return tuple(float(number) for number in value) if isinstance(value, list | tuple) else value
