"""
Every configuration key that kd_det adds to Detectron2's.

Distillers and detectors declare theirs beside the code that reads them; here are the others.
"""

from collections.abc import Iterable

from detectron2.config import CfgNode

from kd_det import modeling
from kd_det.distillers import DISTILLER_REGISTRY, distiller_class, node_name

CN = CfgNode


def add_kd_config(cfg: CfgNode) -> None:
    """
    Add all keys of kd_det and its plugins to a Detectron2 config. Existing keys are kept.

    Distillers and detectors bring their own (`add_config` of each registered class); what belongs
    to none of them stands here.
    """
    modeling.add_config(cfg)
    _add_training(cfg)
    cfg.KD = CN()
    _add_roles(cfg.KD)
    for _, distiller in DISTILLER_REGISTRY:
        cfg.KD[distiller.config_key] = CN()
        distiller.add_config(cfg.KD[distiller.config_key])


def add_labelled_nodes(cfg: CfgNode, names: Iterable[str]) -> None:
    """Add the nodes of distillers that are active under a label: "SSIM:head" has KD.SSIM:head."""
    for name in names:
        if isinstance(name, str) and ":" in name:
            cfg.KD[node_name(name)] = CN()
            distiller_class(name).add_config(cfg.KD[node_name(name)])


def _add_training(cfg: CfgNode) -> None:
    """Keys of the trainer and the evaluator that Detectron2 itself lacks."""
    # "SGD" (Detectron2's own builder, honours every SOLVER key) or "AdamW" (no momentum keys).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning rate of the net below the pyramid over BASE_LR, with AdamW: below 1 where that net
    # starts from ImageNet and the rest from random weights.
    cfg.SOLVER.BOTTOM_UP_LR_FACTOR = 1.0
    # Library that computes COCO metrics: "pycocotools", "faster_coco_eval" (same numbers, several
    # times faster, extra `kd_det[eval]`), or "auto": the faster one where it is installed.
    cfg.TEST.COCO_BACKEND = "auto"
    # Rules of CrowdHuman's AP, MR and JI: "official" (its toolkit's, as in published numbers) or
    # "smooth" (precision envelope, equal scores together: no dependence on the order of images).
    cfg.TEST.CROWDHUMAN_RULES = "official"


def _add_roles(kd: CfgNode) -> None:
    """Who teaches whom."""
    # Modules with other people's distillers, detectors, decoders, data sets and keys, imported
    # before any key is checked: "my_package.distillers", or "my_package:add_my_config" for a
    # function that adds keys, as Detectron2's projects have one.
    kd.PLUGINS = []
    # Active distillers, by registry name, e.g. ["FeatureLp", "SSIM"]. Empty: plain detection
    # training. A second one of a kind takes a label and has keys of its own: ["SSIM", "SSIM:head"]
    # reads KD.SSIM and KD.SSIM:head.
    kd.DISTILLERS = []

    kd.STUDENT = CN()
    # Meta-architecture of the student; what MODEL.META_ARCHITECTURE is in a plain Detectron2
    # config.
    kd.STUDENT.META_ARCHITECTURE = ""
    # What the student sees of the loaded image: its size is divided by this factor (>= 1). Powers
    # of two pair pyramid levels exactly; any other factor needs KD.RESAMPLE_LEVELS. MSAD uses 2.
    kd.STUDENT.VIEW_FACTOR = 1.0
    # How the reduced view is computed: "nearest" (MSAD's code), "bilinear" (antialiased), "area".
    kd.STUDENT.VIEW_INTERPOLATION = "bilinear"

    kd.TEACHER = CN()
    # The teacher's own config file: relative to the yaml that names it, or to the working
    # directory.
    kd.TEACHER.CONFIG_FILE = ""
    # Its checkpoint (path or URL). "auto": the final checkpoint in the OUTPUT_DIR of the teacher's
    # config, which train_net.py trains first when it is absent; of a teacher that is no detector
    # (TimmFeatures), what its own config says.
    kd.TEACHER.WEIGHTS = "auto"
    # Overrides of the teacher's config: ["KEY", value, ...].
    kd.TEACHER.OPTS = []
    # Arithmetic of the teacher's forward pass alone: "float32", "float16" or "bfloat16" (autocast).
    kd.TEACHER.PRECISION = "float32"
    # Patterns (fnmatch) of checkpoint keys that may stay unmatched when the teacher is loaded.
    kd.TEACHER.IGNORE_KEYS = []

    # Module-path patterns (fnmatch, e.g. ["head.*", "backbone.fpn_*"]) of the student's tensors
    # that start as the teacher's, where names and shapes match. Applied at a fresh start only,
    # never on resume. PGD (ECCV 2022) inherits neck and head; MSAD (CVPR 2021) everything: ["*"].
    kd.INHERIT = []
    # Pair levels on different grids by resampling the teacher's map to the student's. Off: such
    # levels are not paired, and a run in which nothing pairs stops.
    kd.RESAMPLE_LEVELS = False
    # Iterations between measurements of kd/<distiller>/grad_share, after the first 20, which all
    # are; fewer in short runs (a fiftieth of MAX_ITER, at least 20). 0 switches them off.
    kd.GRAD_SHARE_PERIOD = 200
    # The user's own data in COCO format: list of {"name":, "json":, "images":}, paths relative to
    # the yaml that names them, or to the working directory.
    kd.DATASETS = []
