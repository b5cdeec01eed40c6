"""The architectures that can be converted, one short module for each family.

To add one: a class with its names, the defaults of its config class and the tensors of a layer (see `Architecture`), listed here, and a case in the tests.
"""

from __future__ import annotations

from typing import Any

from gearcpp.errors import DataError, UnsupportedError

from ..architecture import Architecture
from .deepseek import DeepseekV3
from .ernie import Ernie45
from .falcon import FalconH1
from .gemma import Gemma2, Gemma3
from .gemma4 import Gemma4
from .glm import Glm4, Glm4Moe, Glm4MoeLite
from .gpt2 import Gpt2
from .gpt_oss import GptOss
from .granite import Granite
from .granite_hybrid import GraniteHybrid
from .lfm import Lfm2
from .llama import Llama, Mistral, Mistral3, Mixtral
from .minimax import MiniMaxM2
from .nemotron import NemotronH
from .olmo import Olmo2, Olmo3
from .phi import Phi3
from .qwen import Qwen2, Qwen3, Qwen3Moe
from .qwen_hybrid import Qwen3Next, Qwen35, Qwen35Moe
from .smollm import SmolLM3

ARCHITECTURES: tuple[type[Architecture], ...] = (
    Llama,
    Mistral,
    Mixtral,
    Mistral3,
    SmolLM3,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Qwen3Next,
    Qwen35,
    Qwen35Moe,
    Gemma2,
    Gemma3,
    Gemma4,
    Phi3,
    Glm4,
    Glm4Moe,
    Glm4MoeLite,
    Olmo2,
    Olmo3,
    Granite,
    GraniteHybrid,
    FalconH1,
    NemotronH,
    Ernie45,
    Lfm2,
    MiniMaxM2,
    GptOss,
    DeepseekV3,
    Gpt2,
)

_BY_CLASS = {name: architecture for architecture in ARCHITECTURES for name in architecture.classes}


def architecture_for(config_json: dict[str, Any]) -> Architecture:
    """The architecture of a model folder, ready for its config.

    Raises:
        DataError: config.json names no class.
        UnsupportedError: the class is not among those that can be converted, or the model computes what llama.cpp does not.
    """
    classes = config_json.get("architectures")
    if not isinstance(classes, list) or not classes:
        raise DataError('config.json does not name its model class ("architectures")')
    for name in classes:
        if name in _BY_CLASS:
            return _BY_CLASS[name].for_config({**config_json, **(config_json.get("text_config") or {})})
    raise UnsupportedError(
        f"{', '.join(map(str, classes))} cannot be converted: supported are {', '.join(sorted(_BY_CLASS))}; for others, --upstream LLAMA_CPP_CHECKOUT "
        "(upstream= in Python) runs llama.cpp's own converter"
    )
