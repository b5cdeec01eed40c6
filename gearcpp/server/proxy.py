"""The models that the server's routes find by name: `GearProxy`, in place of llama-cpp-python's."""

from __future__ import annotations

from typing import Any

import llama_cpp
from llama_cpp.server.model import LlamaProxy

from gearcpp.errors import ConfigError
from gearcpp.model_info import read_model_info

from .llama import ServedLlama
from .settings import GearModelSettings


class GearProxy(LlamaProxy):
    """All models, loaded for as long as the server runs: nobody's answer ends because another model is asked for.

    A name that is not known means the first model, as in the parent. Embeddings go to the model that was loaded for them, whatever model is named.
    """

    def __init__(self, models: list[GearModelSettings]) -> None:
        names = [model.model_alias or model.model for model in models]
        if len(set(names)) != len(names):
            raise ConfigError(f"two models have the same name: {', '.join(names)}; give them a model_alias each")
        self._loaded: dict[str, ServedLlama] = {}
        try:
            super().__init__(list(models))
            assert isinstance(self._current_model, ServedLlama)
            self._loaded[names[0]] = self._current_model
            for name, settings in zip(names[1:], models[1:], strict=True):
                self._loaded[name] = self.load_llama_from_model_settings(settings)
        except BaseException:
            self.free()
            raise
        embedders = [model for model in self._loaded.values() if not model.scheduler]
        for model in self._loaded.values():
            model.embedder = embedders[0] if embedders else None

    def __call__(self, model: str | None = None) -> ServedLlama:
        """The model of this name."""
        return self._loaded.get(model or self._default_model_alias) or self._loaded[self._default_model_alias]

    @property
    def loaded(self) -> dict[str, ServedLlama]:
        """Every model by name."""
        return dict(self._loaded)

    def free(self) -> None:
        """Close all models. May be called twice."""
        for model in self._loaded.values():
            model.close()

    @staticmethod
    def load_llama_from_model_settings(settings: GearModelSettings) -> ServedLlama:  # type: ignore[override]
        """Load one model.

        Raises:
            GearError: as gearcpp.Llama.
        """
        arguments = settings.llama_arguments()
        if settings.embedding:
            arguments["pooling_type"] = _pooling(settings)
        llm = ServedLlama(settings.model, name=settings.model_alias or "", n_parallel=settings.parallel, **arguments)
        if settings.chat_template_kwargs:
            llm.chat_handler = _with_arguments(llm, settings.chat_template_kwargs)
        return llm


def _pooling(settings: GearModelSettings) -> int:
    """llama.cpp's own default gives one vector per token for models that say nothing; an embedding is one vector."""
    if settings.pooling is not None:
        return settings.pooling
    info = read_model_info(settings.model)
    return int(info.metadata.get(f"{info.arch}.pooling_type", 0)) or llama_cpp.LLAMA_POOLING_TYPE_MEAN


def _with_arguments(llm: ServedLlama, arguments: dict[str, Any]) -> Any:
    name = llm.chat_format or ""
    handler = llm.chat_handler or llm._chat_handlers.get(name) or llama_cpp.llama_chat_format.get_chat_completion_handler(name)
    return lambda *args, **kwargs: handler(*args, **{**arguments, **kwargs})
