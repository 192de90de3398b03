"""What a contact head is fitted on: for pairs of residues, the corrected attention of every head of every layer.

Shape suffixes: R residues of a protein, N heads of a layer, P pairs of residues, F heads of all layers.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bionemo_esm.inference.contacts.pairs import Pairs
from bionemo_esm.inference.engine import Engine, Residues
from bionemo_esm.model.contact_head import corrected_maps
from bionemo_esm.model.reading import show_attention_maps


@torch.inference_mode()
def attention_features(engine: Engine, tokens: Residues, pairs: Pairs) -> NDArray[np.float32]:
    """Symmetrised and corrected attention at the pairs: float32 [P, F], in the order of a contact head's weights.

    Of the attention maps one layer's at a time is there, float32 [N, R + 2, R + 2].
    """
    heads = engine.config.num_attention_heads
    features_PF = np.empty((len(pairs.first), heads * engine.layers), dtype=np.float32)
    first, second = (torch.from_numpy(places).to(engine.device) for places in (pairs.first, pairs.second))

    def take(layer: int, maps: list[Tensor]) -> None:
        corrected_NRR = corrected_maps(maps[0])
        features_PF[:, (layer - 1) * heads : layer * heads] = corrected_NRR[:, first, second].T.cpu().numpy()

    show_attention_maps(engine.encoder, engine.packed([tokens]), take)
    return features_PF
