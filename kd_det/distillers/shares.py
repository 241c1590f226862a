"""How hard a distiller pulls at first where no weight is given."""

from detectron2.config import CfgNode

from kd_det.distillers.base import Distiller


def share_of(method: Distiller | type[Distiller], node: CfgNode, *, trained: bool) -> float:
    """
    Return the SHARE of a distiller's node, or the method's own.

    Args:
        method: the distiller, or its class.
        node: of the config.
        trained: whether the student starts from trained weights.
    """
    own = method.share_of_trained if trained else method.share
    return float(own if node.SHARE is None else node.SHARE)
