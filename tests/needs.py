"""What tests need that the oldest torch supported has not got: they are skipped there, with the reason."""

import pytest
import torch

from fastlora.integrations.versions import numbers


def older_than(version: str) -> bool:
    """Whether this torch comes before `version`, as "2.9"."""
    return numbers(torch.__version__) < numbers(version)


def needs_torch(version: str, why: str) -> pytest.MarkDecorator:
    """A mark for tests; why: what torch does from `version` on."""
    return pytest.mark.skipif(older_than(version), reason=f"needs torch {version}: {why}")


def skip_before(version: str, why: str) -> None:
    """The same within a fixture."""
    if older_than(version):
        pytest.skip(f"needs torch {version}: {why}")


PATCHING = ("2.9", "it has torch.library.get_kernel")
patches_bitsandbytes = needs_torch(*PATCHING)
traces_peft = needs_torch("2.9", "it traces the context managers of PeftModel.forward")
traces_bitsandbytes = needs_torch("2.9", "it traces Params4bit")
fsdp_of_bytes = needs_torch("2.12", "its fully_shard takes uint8 parameters")
fsdp_on_cpus = needs_torch("2.9", "its fully_shard works on CPUs")
