"""Completion requests as the plug-in decides them, without a server."""

import pytest
from dftserve_vllm import request_params
from vllm import SamplingParams
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError


def params_of(**fields) -> SamplingParams:
    """The sampling parameters of a request with these fields."""
    request = CompletionRequest(model="m", prompt="x", **fields)
    return request_params.honour(CompletionRequest.to_sampling_params)(request, 8, {})


def refused(**fields) -> VLLMValidationError:
    """The refusal of a request with these fields."""
    with pytest.raises(VLLMValidationError) as refusal:
        params_of(**fields)
    return refusal.value
