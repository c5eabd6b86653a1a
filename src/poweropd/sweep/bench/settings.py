"""What is compared: the rewards and objectives, and the questions that pairs of them answer."""

from typing import NamedTuple

#: Overrides in front of every setting's own, so that the recipe's reward and objective are no part.
PLAIN = (
    "objective.kind=sampled",
    "objective.baseline=none",
    "objective.select=null",
    "objective.top_k=null",
    "objective.weights=null",
)
VANILLA = "reward={name: log_ratio}"
FULL = "objective.kind=full_vocab"
BASELINE = "log_ratio"


def _power(alpha: float) -> str:
    return f"reward={{name: power, alpha: {alpha:g}}}"


#: Name -> overrides. The first one is the baseline.
SETTINGS: dict[str, tuple[str, ...]] = {
    BASELINE: (VANILLA,),
    "clip": ("reward={name: clip}",),
    "tanh": ("reward={name: tanh}",),
    "zscore": ("reward={name: zscore}",),
    **{f"power {alpha:g}": (_power(alpha),) for alpha in (0.5, 5, 50, 500)},
    "tanh 0.4": ("reward={name: tanh, temperature: 0.4}",),
    "damped 5": ("reward={name: 'poweropd.sweep.bench.controls:damped', alpha: 5}",),
    "hellinger": ("reward={name: hellinger}",),
    "proximal": ("reward={name: proximal}",),
    "jensen_shannon": ("reward={name: jensen_shannon}",),
    "sign": ("reward={name: sign}",),
    "trust": ("reward={name: trust}",),
    "gate": ("reward={name: gate}",),
    "suppress": ("reward={name: suppress}",),
    "value baseline": (VANILLA, "objective.baseline=value"),
    "dial": (VANILLA, "objective.select={name: dial}"),
    "teachable": (VANILLA, "objective.select={name: teachable}"),
    "random tokens": (VANILLA, "objective.select={name: random}"),
    "drift weights": (VANILLA, "objective.weights={name: drift}"),
    "full_vocab": (VANILLA, FULL),
    "full_vocab power 500": (_power(500), FULL),
}


class Question(NamedTuple):
    """A question that the difference `first` - `second` answers."""

    text: str
    first: str
    second: str


QUESTIONS = (
    *(
        Question(f"Does power at alpha {alpha} beat vanilla?", f"power {alpha}", BASELINE)
        for alpha in ("0.5", "5", "50", "500")
    ),
    *(
        Question("Is more alpha better?", f"power {more}", f"power {less}")
        for less, more in (("0.5", "5"), ("5", "50"), ("50", "500"))
    ),
    Question("Is a bound enough?", "clip", BASELINE),
    *(
        Question("Does power beat the squashed log ratios?", "power 500", name)
        for name in ("clip", "tanh", "zscore")
    ),
    Question("Power 5 against its bound alone", "power 5", "tanh 0.4"),
    Question("Power 5 against its damping alone", "power 5", "damped 5"),
    Question("Does less noise help vanilla?", "value baseline", BASELINE),
    Question("Without sampled tokens, does power lead?", "full_vocab power 500", "full_vocab"),
    Question("Is the sign enough?", "power 500", "sign"),
    Question("Is it enough to leave outliers out?", "power 500", "trust"),
    Question("Does it need the student's probability?", "power 500", "gate"),
    Question("Does it need the teacher?", "power 500", "suppress"),
    *(
        Question("Does it matter which tokens are kept?", kept, "random tokens")
        for kept in ("dial", "teachable")
    ),
    Question("Full vocabulary against vanilla", "full_vocab", BASELINE),
    Question("Full vocabulary against power 500", "full_vocab", "power 500"),
)
