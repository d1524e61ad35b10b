"""diffusers' scheduler_config.json against schedule, objective and sampler."""

from typing import Any, Literal, get_args

from src.build import check_value
from src.errors import UserError

PREDICTIONS = {"epsilon": "Eps", "sample": "X0", "v_prediction": "V"}
TABULATED = "src.diffusion.tabulated.Tabulated"
VARIANCES = {"fixed_small": "posterior", "fixed_large": "beta", "learned_range": "learned"}
ANCESTRAL, IMPLICIT = "DDPMScheduler", "DDIMScheduler"
Spacing = Literal["leading", "linspace", "trailing"]
UNBOUNDED = 100.0  # a bound on the threshold of dynamic clipping that nothing comes near
TYPES: dict[str, Any] = {
    "num_train_timesteps": int,
    "beta_start": float,
    "beta_end": float,
    "trained_betas": list[float] | None,
    "rescale_betas_zero_snr": bool,
    "clip_sample": bool,
    "clip_sample_range": float,
    "thresholding": bool,
    "dynamic_thresholding_ratio": float,
    "sample_max_value": float,
    "timestep_spacing": Spacing,
}
NAMES = {"linear": "Linear", "scaled_linear": "ScaledLinear", "squaredcos_cap_v2": "Cosine"}


def read_scheduler(theirs: dict[str, Any], path: Any) -> dict[str, Any]:
    """The nodes schedule, objective and sampler that it describes.

    Where it draws in fewer steps and puts them elsewhere by steps_offset, the sampler does not.

    Raises:
        UserError: for a schedule of betas or a prediction that this project does not have.
    """
    kind = theirs.get("_class_name", ANCESTRAL)
    if kind not in (ANCESTRAL, IMPLICIT) and not (theirs.get("beta_schedule") or theirs.get("trained_betas")):
        raise UserError(f"{path}: a {kind} has no betas, and only schedulers of betas can be read")
    for key, hint in TYPES.items():
        if key in theirs:
            check_value(f"{path}: {key}", theirs[key], hint)
    if theirs.get("timestep_type", "discrete") != "discrete":
        raise UserError(f"{path}: timestep_type={theirs['timestep_type']} cannot be read; it must be discrete")
    prediction = theirs.get("prediction_type", "epsilon" if theirs.get("predict_epsilon", True) else "sample")
    if prediction not in PREDICTIONS:
        raise UserError(f"{path}: prediction_type={prediction} cannot be read; it must be {', '.join(PREDICTIONS)}")
    objective = {"_target_": f"src.diffusion.objectives.{PREDICTIONS[prediction]}"}
    return {"schedule": _read_schedule(theirs, path), "objective": objective, "sampler": _read_sampler(theirs, path)}


def _read_schedule(theirs: dict[str, Any], path: Any) -> dict[str, Any]:
    zero = {"zero_terminal_snr": theirs.get("rescale_betas_zero_snr", False)}
    kind, T = theirs.get("beta_schedule", "linear"), theirs.get("num_train_timesteps", 1000)
    if theirs.get("trained_betas") is not None:
        if zero["zero_terminal_snr"]:
            raise UserError(f"{path}: trained_betas cannot be read together with rescale_betas_zero_snr")
        return {"_target_": TABULATED, "betas": list(theirs["trained_betas"])}
    if kind not in NAMES:
        raise UserError(f"{path}: beta_schedule={kind} cannot be read; it must be {', '.join(NAMES)}, or trained_betas")
    target = {"_target_": f"src.diffusion.schedules.{NAMES[kind]}", "num_timesteps": T}
    if kind == "squaredcos_cap_v2":
        return {**target, "s": 0.008, "max_beta": 0.999, **zero}
    ends = {"beta_start": theirs.get("beta_start", 1e-4), "beta_end": theirs.get("beta_end", 0.02)}
    return {**target, **ends, **zero}


def _read_sampler(theirs: dict[str, Any], path: Any) -> dict[str, Any]:
    kind = theirs.get("_class_name", ANCESTRAL)
    ancestral, clips = kind == ANCESTRAL, theirs.get("clip_sample", kind in (ANCESTRAL, IMPLICIT))
    variance = str(theirs.get("variance_type", "fixed_small")).removesuffix("_log")
    if ancestral and variance not in VARIANCES:
        raise UserError(f"{path}: variance_type={variance} cannot be read; it must be {', '.join(VARIANCES)}")
    if clips and theirs.get("clip_sample_range", 1.0) != 1.0:
        raise UserError(f"{path}: clip_sample_range={theirs['clip_sample_range']} cannot be read; it must be 1")
    clip: bool | str = clips
    if theirs.get("thresholding"):
        bound = theirs.get("sample_max_value", 1.0)  # theirs clips to at most this; to 1, and it is no threshold
        if bound != 1 and bound < UNBOUNDED:
            raise UserError(f"{path}: sample_max_value={bound} cannot be read; it must be 1, or at least {UNBOUNDED:g}")
        clip = True if bound == 1 else "dynamic"
    common = {
        "steps": None,
        "spacing": theirs.get("timestep_spacing", "leading"),
        "clip": clip,
        "percentile": theirs.get("dynamic_thresholding_ratio", 0.995),
        "double": False,
    }
    if ancestral:
        return {"_target_": "src.diffusion.samplers.DDPM", "variance": VARIANCES[variance], **common}
    return {"_target_": "src.diffusion.samplers.DDIM", "eta": 0.0, **common}


def write_scheduler(config: dict[str, Any], learned_variance: bool) -> dict[str, Any]:
    """DDPMScheduler's configuration of a run.

    Raises:
        UserError: for an objective or a schedule that it does not have.
    """
    from src.build import build
    from src.diffusion.schedules import DiscreteSchedule

    objective, node = config["objective"]["_target_"].rpartition(".")[2], config["schedule"]
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    schedule = build(node, "schedule")
    if objective not in predictions or not isinstance(schedule, DiscreteSchedule):
        what = f"objective {objective}" if objective not in predictions else f"schedule {type(schedule).__name__}"
        raise UserError(
            f"{what} has no place in diffusers' {ANCESTRAL}, which has eps, x0 and v in discrete steps; use "
            "format=safetensors, which holds any network"
        )
    kinds = {ours: theirs for theirs, ours in NAMES.items()}
    kind = kinds.get(type(schedule).__name__)
    as_named = kind is not None and (
        kind != "squaredcos_cap_v2" or (node.get("s"), node.get("max_beta")) == (0.008, 0.999)
    )
    sampler = config["sampler"]
    variance = "learned" if learned_variance else sampler.get("variance", "posterior")
    variances = {ours: theirs for theirs, ours in VARIANCES.items()}
    return {
        "_class_name": ANCESTRAL,
        "_diffusers_version": "0.30.0",
        "num_train_timesteps": schedule.num_timesteps,
        "beta_schedule": kind if as_named else "linear",
        "beta_start": node.get("beta_start", 1e-4),
        "beta_end": node.get("beta_end", 0.02),
        "trained_betas": None if as_named and not node.get("zero_terminal_snr") else schedule.betas.tolist(),
        "variance_type": variances[variance],
        "prediction_type": predictions[objective],
        "clip_sample": sampler.get("clip", True) is True,
        "clip_sample_range": 1.0,
        "thresholding": sampler.get("clip") == "dynamic",
        "dynamic_thresholding_ratio": sampler.get("percentile", 0.995),
        "sample_max_value": UNBOUNDED if sampler.get("clip") == "dynamic" else 1.0,
        "timestep_spacing": sampler["spacing"] if sampler.get("spacing") in get_args(Spacing) else "trailing",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }
