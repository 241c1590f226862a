"""How hard a distiller pulls at first where no weight is given."""

from detectron2.config import CfgNode

from kd_det.distillers.base import Distiller


def share_of(
    method: Distiller | type[Distiller], node: CfgNode, *, trained: bool, kin: bool
) -> float:
    """
    Return the SHARE of a distiller's node, or the method's own.

    Args:
        method: the distiller, or its class.
        node: of the config.
        trained: whether the student starts from trained weights.
        kin: whether its teacher has its net below the pyramid.
    """
    if node.SHARE is not None:
        return float(node.SHARE)
    if trained and kin and method.share_of_kin is not None:
        return method.share_of_kin
    return method.share_of_trained if trained else method.share
