"""The OpenAPI document of vLLM's app has the fields on every route that docs/api.md lists."""

import copy

import pytest
from dftserve_vllm import openapi

from dftserve import json_schema
from tests.vllm_app import body_schema, built, routes_with_fields

FIELDS = {"diversity": json_schema.diversity(), "style": json_schema.style()}


@pytest.fixture(scope="module")
def documents():
    """vLLM's own document, and the one with the fields."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.plugins.plugins_loaded", True)  # No hooks in this process.
        app = built()
    stock = copy.deepcopy(app.openapi())
    return stock, openapi.with_fields(app.openapi)()


@pytest.mark.parametrize("route", routes_with_fields())
def test_the_body_of_each_route_has_the_fields(documents, route):
    stock, ours = (body_schema(document, route)["properties"] for document in documents)
    assert ours == stock | FIELDS
    assert not stock.keys() & FIELDS.keys()


def test_docs_list_one_route_for_each_documented_body():
    routes = routes_with_fields()
    assert len(routes) == len(set(routes)) == len(openapi.DOCUMENTED)
    assert "/v1/chat/completions/batch" in routes


def test_the_rest_of_the_document_is_unchanged(documents):
    stock, ours = documents
    ours = copy.deepcopy(ours)
    for name in openapi.DOCUMENTED:
        for field in FIELDS:
            del ours["components"]["schemas"][name]["properties"][field]
    assert ours == stock
