"""Layers of Mamba 2, which Granite 4, Falcon-H1 and Nemotron-H have among or beside attention."""

from collections.abc import Mapping

from gearcpp.errors import DataError

from ..architecture import Architecture, Shape
from ..layout import decay, squeezed
from ..metadata import Metadata
from ..rows import Folded, Rows

MAMBA2: Mapping[str, Shape] = {
    "ssm_in": ("ssm_projection", "model"),
    "ssm_conv1d": ("ssm_convolution", "window"),
    "ssm_dt": ("ssm_heads",),
    "ssm_a": ("ssm_heads", "one"),
    "ssm_d": ("ssm_heads", "one"),
    "ssm_norm": ("ssm_groups", "ssm_group"),
    "ssm_out": ("model", "ssm_inner"),
}
ATTENTION_NAMES = ("attention", "full_attention")  # in layer_types: as published, as transformers 5 saves it


class Mamba2(Architecture):
    """What such layers need of config.json, by Granite's names for it: a class gives aliases where it has others."""

    renamed = {".dt_bias": ".dt_proj.bias"}
    taken_for_granted = {**Architecture.taken_for_granted, "mamba_proj_bias": (False,)}
    copied_keys = {
        "ssm.conv_kernel": ("mamba_d_conv", int),
        "ssm.state_size": ("mamba_d_state", int),
        "ssm.group_count": ("mamba_n_groups", int),
        "ssm.time_step_rank": ("mamba_n_heads", int),
    }

    def ssm_inner(self) -> int:
        """Channels that the layers compute with."""
        return self.config.positive("mamba_expand") * self.config.d_model

    def sizes(self) -> dict[str, int]:
        config, inner = self.config, self.ssm_inner()
        n_heads, n_groups, state = (config.positive(name) for name in ("mamba_n_heads", "mamba_n_groups", "mamba_d_state"))
        if inner % n_groups or inner % n_heads:
            raise DataError(f"config.json contradicts itself: {inner} channels of Mamba cannot be parted into {n_groups} groups and {n_heads} heads")
        return {
            **super().sizes(),
            "one": 1,
            "ssm_heads": n_heads,
            "ssm_groups": n_groups,
            "ssm_group": inner // n_groups,
            "ssm_inner": inner,
            "ssm_convolution": inner + 2 * n_groups * state,
            "ssm_projection": 2 * (inner + n_groups * state) + n_heads,
            "window": config.positive("mamba_d_conv"),
        }

    def metadata(self) -> Metadata:
        return {**super().metadata(), "ssm.inner_size": self.ssm_inner()}

    def _reordered(self, name: str, rows: Rows) -> Rows:
        sizes = self.sizes()
        folds = {"ssm_a": (sizes["ssm_heads"], 1), "ssm_d": (sizes["ssm_heads"], 1), "ssm_norm.weight": (sizes["ssm_groups"], sizes["ssm_group"])}
        kind = name.split(".", 2)[-1]
        if shape := folds.get(kind):
            if rows.shape != (shape[0] * shape[1],):
                return rows  # its shape is wrong, which is said later
            return Folded(decay(rows) if kind == "ssm_a" else rows, shape)
        return squeezed(rows) if ".ssm_conv1d." in name else super()._reordered(name, rows)
