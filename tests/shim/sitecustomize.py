"""Changes to engines under test at their start; only on the PYTHONPATH of their processes.

TEST_V2_ON_CPU=1    vLLM's V2 model runner on a CPU, its Triton kernels interpreted
TEST_FAULT_FILE=F   while F exists, every call of the transform fails after computing its result;
                    each failure adds a byte to F.count
                    while F.nan exists, it gets rows of NaN, like those of a broken model, and its
                    result is discarded; each such row adds a byte to F.nan.count
TEST_HOOK_FAULT=H:K a fault in a hook of the plug-in: see hook_faults
"""

import copy
import importlib.util
import os
from pathlib import Path

if os.environ.get("TEST_V2_ON_CPU") == "1":
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"


def _add_a_cpu_driver(module):
    class Driver:
        @staticmethod
        def is_active():
            return True

    module.backends["cpu"] = module.Backend(compiler=None, driver=Driver)


def _cast_masks_to_boolean(module):
    builder = module.InterpreterBuilder

    def casting(method, index):
        def wrapped(self, *args, **kwargs):
            args = list(args)
            args[index].data = args[index].data.astype(bool)
            return method(self, *args, **kwargs)

        return wrapped

    builder.create_masked_load = casting(builder.create_masked_load, 1)
    builder.create_masked_store = casting(builder.create_masked_store, 2)


def _disable_the_triton_sampler(module):
    module.HAS_TRITON = False


def _inject_faults(module):
    transform_step = module.transform_step
    trigger = os.environ["TEST_FAULT_FILE"]

    def add_to_count(name, times):
        with open(f"{name}.count", "ab") as count:
            count.write(b"." * times)

    def failing(logits_XV, step, slots, *rest):
        if os.path.exists(f"{trigger}.nan"):
            add_to_count(f"{trigger}.nan", len(step.slot_R))
            return transform_step(logits_XV * float("nan"), step, slots, *rest)
        if not os.path.exists(trigger):
            return transform_step(logits_XV, step, slots, *rest)
        add_to_count(trigger, 1)
        transform_step(logits_XV.clone(), step, copy.deepcopy(slots), *rest)
        raise RuntimeError("an injected fault")

    module.transform_step = failing


def _when_imported():
    """The plug-in's own function, loaded from its file: a stock environment has no plug-in."""
    file = Path(__file__).parents[2] / "plugins/vllm/dftserve_vllm/imports.py"
    spec = importlib.util.spec_from_file_location("_test_imports", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.when_imported


def _install():
    if fault := os.environ.get("TEST_HOOK_FAULT"):
        import hook_faults

        hook_faults.install(fault)
    when_imported = _when_imported()
    if os.environ.get("TEST_V2_ON_CPU") == "1":
        when_imported("triton.backends", _add_a_cpu_driver)
        when_imported("triton.runtime.interpreter", _cast_masks_to_boolean)
        when_imported("vllm.v1.sample.ops.topk_topp_sampler", _disable_the_triton_sampler)
    if "TEST_FAULT_FILE" in os.environ:
        when_imported("dftserve_vllm.worker_state", _inject_faults)


_install()
