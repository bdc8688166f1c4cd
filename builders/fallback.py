"""What is published if a build fails: the unquantized checkpoint, for the transformers engine. PURE."""

from builders.spec import BuildSpec
from serve.artifacts.manifest import BundleKind
from serve.core.parallel import ParallelLayout

_SAMPLES = 8
_TRIAL_S = 5.0


def fallback_spec(spec: BuildSpec) -> BuildSpec | None:
    """Return the build of the fallback; None: there is none, or it is this build already.

    It is verified as any other, quickly: a model beside itself differs by rounding alone.
    """
    if spec.fallback is None:
        return None
    verify = spec.verify.model_copy(
        update={
            "texts": spec.verify.texts.model_copy(update={"samples": min(_SAMPLES, spec.verify.texts.samples)}),
            "tasks": (),
            "reference_engine": "auto",
        }
    )
    fallback = spec.model_copy(
        update={
            "kind": BundleKind.TRANSFORMERS_CHECKPOINT,
            "quantize": type(spec.quantize)(),
            "engine": {},
            # That engine cuts layers only.
            "parallel": ParallelLayout(tensor=spec.parallel.world_size),
            "target": spec.target.model_copy(update={"engine_env": None}),
            "compile": type(spec.compile)(),
            "tune": spec.tune.model_copy(update={"search": "off", "trial_s": min(_TRIAL_S, spec.tune.trial_s)}),
            "verify": verify,
            "fallback": None,
        }
    )
    unchanged = spec.kind is fallback.kind and spec.quantize == fallback.quantize
    return None if unchanged else BuildSpec.model_validate(fallback.model_dump())
