"""What the plug-in adds to vLLM's HTTP app: middleware for the answer and for large bodies, one
route, and its fields in the app's OpenAPI document.

vLLM's own interface for this is `EndpointPlugin` below, which it loads only if `VLLM_PLUGINS` names
it; otherwise `hooks` calls `extend` around `build_app`. Both may happen: an app is extended only
once.
"""

from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware

from dftserve_vllm import capabilities, hooks, is_disabled, metrics, openapi
from dftserve_vllm.body_limit import BodyLimit
from dftserve_vllm.field_guard import FieldGuard
from dftserve_vllm.response_middleware import ResponseMiddleware

ROUTE = "/v1/dft/capabilities"


def extend(app: Any) -> Any:
    """Add the plug-in's parts to a FastAPI app, once; if that fails, the field is refused.

    Args:
        app: vLLM's app, possibly with its middleware stack already built.
    """
    try:
        _extend(app)
    except Exception as error:  # noqa: BLE001 - the server must start
        hooks.record_failure(hooks.APP, error)
    return app


def _extend(app: Any) -> None:
    if getattr(app.state, "dftserve", False):
        return
    app.state.dftserve = True
    metrics.metrics()

    def route() -> dict[str, Any]:
        # vLLM creates `openai_serving_models` after the app.
        return capabilities.capabilities(getattr(app.state, "openai_serving_models", None))

    app.add_api_route(ROUTE, route, methods=["GET"])
    unseen = [hook for hook in hooks.REQUEST_HOOKS if hook.name in hooks.problems()]
    # `BodyLimit` is innermost, so that the app's own handlers answer the exception it raises.
    _add(app, ResponseMiddleware, *([FieldGuard] if unseen else []), BodyLimit)
    app.openapi = openapi.with_fields(app.openapi)


def _add(app: Any, *middleware: Any) -> None:
    """Add middleware inside all others, the last one innermost, so that what other middleware does
    to an answer (compression) also applies to ours.

    vLLM may already have built the stack, for a container's middleware. Then it is rebuilt, unless
    something was wrapped around it that a rebuild would lose; in that case ours goes outermost.
    """
    if app.middleware_stack is None:
        app.user_middleware += map(Middleware, middleware)
    elif type(app.middleware_stack) is ServerErrorMiddleware:
        app.user_middleware += map(Middleware, middleware)
        app.middleware_stack = app.build_middleware_stack()
    else:
        for each in reversed(middleware):
            app.middleware_stack = each(app.middleware_stack)


class EndpointPlugin:
    """vLLM's interface for plug-ins that add to its HTTP app; loaded where `VLLM_PLUGINS` names
    `dftserve`."""

    name = "dftserve"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        if not is_disabled():
            extend(app)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Does nothing: the configuration is recorded when the engine is created."""
