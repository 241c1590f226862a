"""
Every configuration key that kd_det adds to Detectron2's.

Distillers and detectors declare theirs beside the code that reads them; here are the others.
"""

from collections.abc import Iterable

from detectron2.config import CfgNode

from kd_det.distillers import DISTILLER_REGISTRY, distiller_class, node_name

CN = CfgNode


def add_kd_config(cfg: CfgNode) -> None:
    """
    Add all keys of kd_det and its plugins to a Detectron2 config. Existing keys are kept.

    Distillers and detectors bring their own (`add_config` of each registered class); what belongs
    to none of them stands here.
    """
    _add_detectors(cfg)
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


def _add_detectors(cfg: CfgNode) -> None:
    """Detectors that Detectron2 cannot build from yaml, and their backbones."""
    # Keys of BACKBONE.NAME "build_fpn_backbone", beside Detectron2's own MODEL.FPN.*: the pyramid
    # starts at the level of IN_FEATURES[0] (res2: P2, res3: P3).
    # The net below: "resnet" (MODEL.RESNETS.*, any width, also depth 18 and 34) or "timm"
    # (MODEL.TIMM.*).
    cfg.MODEL.FPN.BOTTOM_UP = "resnet"
    # Levels above P5: "p6p7_c5" (convolutions on C5: RetinaNet, ICCV 2017; MSAD), "p6p7_p5" (on P5:
    # FCOS, TPAMI 2020), "p6_c5" (P6 alone, for detectors on P2..P6), "maxpool" (P6 subsamples P5:
    # FPN, CVPR 2017) or "none".
    cfg.MODEL.FPN.TOP_BLOCK = "p6p7_c5"

    cfg.MODEL.TIMM = CN()
    # Model name in timm (extra `kd_det[timm]`).
    cfg.MODEL.TIMM.NAME = "mobilenetv2_100"
    # Download timm's ImageNet weights. They take RGB: set INPUT.FORMAT "RGB" and, for most models,
    # MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] and MODEL.PIXEL_STD [58.395, 57.12, 57.375].
    cfg.MODEL.TIMM.PRETRAINED = False
    # Levels the model returns, named by stride: res2 is stride 4, res5 is stride 32.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]

    _add_fcos(cfg)
    _add_atss(cfg)
    _add_gfl(cfg)
    _add_aligned(cfg)


def _add_fcos(cfg: CfgNode) -> None:
    """FCOS (ICCV 2019; TPAMI 2020). Defaults are those of Detectron2's class and its 1x config."""
    cfg.MODEL.FCOS = CN()
    # Object classes, background not counted.
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    # Pyramid levels, finest first. An object belongs to the level of stride s where the longest
    # distance from the position to its sides is 4s to 8s; first and last level are open-ended.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # 3x3 convolutions in each of the two towers; their width is that of the pyramid.
    cfg.MODEL.FCOS.NUM_CONVS = 4
    # Norm in the towers: "GN" (gcd(32, width) groups), "BN" or "SyncBN" (statistics per level), "".
    cfg.MODEL.FCOS.NORM = "GN"
    # Positions closer to a box's centre than this many strides, in x and y, may be positive.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Focal loss (RetinaNet, ICCV 2017): weight of positives in [0, 1], and focusing exponent.
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Class probability every position starts with.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # Distance in strides from a position to each side of its box that training starts with.
    # Detectron2's is 0, where the ReLU of its boxes may die: from random weights give 2.
    cfg.MODEL.FCOS.BOX_BIAS = 0.0
    # Detections below this score are dropped. The score is sqrt(class * centerness), so 0.2 means
    # the product 0.04.
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    # Candidates each level may send to non-maximum suppression.
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    # IoU above which non-maximum suppression drops the lower-scored box of a class.
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6


def _single_anchor_keys() -> CfgNode:
    """Keys of the detectors with one square anchor per position and the assignment of ATSS."""
    node = CN()
    # Object classes, background not counted.
    node.NUM_CLASSES = 80
    # Pyramid levels, finest first.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # 3x3 convolutions in each of the two towers; their width is that of the pyramid.
    node.NUM_CONVS = 4
    # Norm in the towers: "GN" (groups: gcd(32, width)), "BN"/"SyncBN" (statistics per level) or "".
    node.NORM = "GN"
    # Class probability every position starts with.
    node.PRIOR_PROB = 0.01
    # Side of the anchors in strides of their level. Their centres: MODEL.ANCHOR_GENERATOR.OFFSET
    # strides from the corner of the image; SIZES and ASPECT_RATIOS there have no effect.
    node.ANCHOR_SCALE = 8.0
    # Candidates of each object on each level, nearest centres first (ATSS, CVPR 2020: 9).
    node.TOPK = 9
    # Factor of the GIoU loss.
    node.BBOX_LOSS_WEIGHT = 2.0
    # Detections of a class probability below this are dropped.
    node.SCORE_THRESH_TEST = 0.05
    # Candidates each level may send to non-maximum suppression.
    node.TOPK_CANDIDATES_TEST = 1000
    # IoU above which non-maximum suppression drops the lower-scored box of a class.
    node.NMS_THRESH_TEST = 0.6
    return node


def _add_atss(cfg: CfgNode) -> None:
    """ATSS (CVPR 2020)."""
    cfg.MODEL.ATSS = _single_anchor_keys()
    # What the third branch predicts: "centerness" (the paper), or "iou", the IoU of the predicted
    # box with its object (PGD, ECCV 2022). Its target also weighs the GIoU loss of each positive,
    # and a detection's score is sqrt(class * quality).
    cfg.MODEL.ATSS.QUALITY_BRANCH = "centerness"
    # Factor of that branch's loss (binary cross-entropy).
    cfg.MODEL.ATSS.QUALITY_LOSS_WEIGHT = 1.0
    # Multiples of (dx, dy, dw, dh) that the box branch predicts.
    cfg.MODEL.ATSS.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    # Focal loss (RetinaNet, ICCV 2017): weight of positives in [0, 1], and focusing exponent.
    cfg.MODEL.ATSS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.ATSS.FOCAL_LOSS_GAMMA = 2.0


def _add_gfl(cfg: CfgNode) -> None:
    """GFL (NeurIPS 2020)."""
    cfg.MODEL.GFL = _single_anchor_keys()
    # Largest distance from an anchor's centre to a side of its box, in strides of the level; each
    # side is a distribution over 0 .. REG_MAX.
    cfg.MODEL.GFL.REG_MAX = 16
    # Exponent of the quality focal loss.
    cfg.MODEL.GFL.QUALITY_FOCAL_BETA = 2.0
    # Factor of the distribution focal loss.
    cfg.MODEL.GFL.DFL_LOSS_WEIGHT = 0.25


def _add_aligned(cfg: CfgNode) -> None:
    """
    AlignedMultiScaleDetector, MSAD's teacher (CVPR 2021).

    The wrapped detector's IN_FEATURES name the full view's levels (p3..p7 at FACTOR 2, RPN's and
    ROI_HEADS' too); the FPN must also have those that the reduced view needs (p2..p6).
    """
    cfg.MODEL.ALIGNED = CN()
    # The wrapped detector, built from this same config: a dense detector or GeneralizedRCNN.
    cfg.MODEL.ALIGNED.META_ARCHITECTURE = "FCOS"
    # Sides of the reduced view are the full view's divided by this; a power of two, MSAD: 2. At 4 a
    # ResNet's full view starts at p4.
    cfg.MODEL.ALIGNED.FACTOR = 2
    # How the reduced view is computed from the normalised, padded batch: "nearest" (MSAD's code:
    # pixels 0, 2, 4, ...), "bilinear" (antialiased) or "area".
    cfg.MODEL.ALIGNED.INTERPOLATION = "nearest"
    # Blend of the two pyramids: "cff" (MSAD's crossing feature-level fusion) or "mean".
    cfg.MODEL.ALIGNED.FUSION = "cff"
    # Input units of cff's gate per hidden unit (MSAD: 16).
    cfg.MODEL.ALIGNED.FUSION_REDUCTION = 16
    # Weights of the detection losses of the branches high, low and fused (MSAD: 1, 1, 0.4).
    cfg.MODEL.ALIGNED.LOSS_WEIGHTS = [1.0, 1.0, 0.4]
    # Branch whose detections evaluation returns: "fused" (as published), "high" or "low". The
    # latter two run one view alone.
    cfg.MODEL.ALIGNED.EVAL_BRANCH = "fused"
    # BatchNorm keeps running statistics per branch, affine parameters shared. MSAD shares both, so
    # that evaluation uses a blend of the statistics of two resolutions.
    cfg.MODEL.ALIGNED.SPLIT_BN = False
    # Leave the padded area of batched images out of cff's pooling (MSAD pools over all of it).
    cfg.MODEL.ALIGNED.MASK_PADDING = False


def _add_training(cfg: CfgNode) -> None:
    """Keys of the trainer and the evaluator that Detectron2 itself lacks."""
    # "SGD" (Detectron2's own builder, honours every SOLVER key) or "AdamW" (no momentum keys).
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Library that computes COCO metrics: "pycocotools", "faster_coco_eval" (same numbers, several
    # times faster, extra `kd_det[eval]`), or "auto": the faster one where it is installed.
    cfg.TEST.COCO_BACKEND = "auto"


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
    # config, which train_net.py trains first when it is absent.
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
    # Iterations between measurements of kd/<distiller>/grad_share; 0 switches them off.
    kd.GRAD_SHARE_PERIOD = 200
    # The user's own data in COCO format: list of {"name":, "json":, "images":}, paths relative to
    # the yaml that names them, or to the working directory.
    kd.DATASETS = []
