"""The classifier that a configuration describes."""

from ranking import classifier_config as config
from ranking.classifiers import deep, maps, products, shallow
from ranking.classifiers.inputs import InputDims

_ShallowConfig = config.LogisticRegression | config.Fm | config.Ffm
_DeepConfig = (
    config.Dnn | config.WideDeep | config.DeepFm | config.DcnV2 | config.MaskNet | config.FinalMlp
)
_ProductsConfig = config.Ipnn | config.Opnn | config.Pin | config.Dlrm | config.FiBiNet
_MapsConfig = config.Ccpm | config.XDeepFm | config.AutoInt
Shallow = shallow.LogisticRegressionClassifier | shallow.FmClassifier | shallow.FfmClassifier
Deep = (
    deep.DnnClassifier
    | deep.WideDeepClassifier
    | deep.DeepFmClassifier
    | deep.DcnV2Classifier
    | deep.MaskNetClassifier
    | deep.FinalMlpClassifier
)
Products = (
    products.IpnnClassifier
    | products.OpnnClassifier
    | products.PinClassifier
    | products.DlrmClassifier
    | products.FiBiNetClassifier
)
Maps = maps.CcpmClassifier | maps.XDeepFmClassifier | maps.AutoIntClassifier


def build_classifier(
    settings: config.Classifier, dims: InputDims
) -> Shallow | Deep | Products | Maps:
    """The module; its `output_dim` is the width of the representation.

    Raises:
        UserError: the fields' dims do not suit it.
    """
    match settings:
        case config.LogisticRegression() | config.Fm() | config.Ffm():
            return _shallow(settings, dims)
        case (
            config.Dnn()
            | config.WideDeep()
            | config.DeepFm()
            | config.DcnV2()
            | config.MaskNet()
            | config.FinalMlp()
        ):
            return _deep(settings, dims)
        case config.Ipnn() | config.Opnn() | config.Pin() | config.Dlrm() | config.FiBiNet():
            return _products(settings, dims)
        case config.Ccpm() | config.XDeepFm() | config.AutoInt():
            return _maps(settings, dims)


def _shallow(settings: _ShallowConfig, dims: InputDims) -> Shallow:
    match settings:
        case config.LogisticRegression():
            return shallow.LogisticRegressionClassifier(settings, dims)
        case config.Fm():
            return shallow.FmClassifier(settings, dims)
        case config.Ffm():
            return shallow.FfmClassifier(settings, dims)


def _deep(settings: _DeepConfig, dims: InputDims) -> Deep:
    match settings:
        case config.Dnn():
            return deep.DnnClassifier(settings, dims)
        case config.WideDeep():
            return deep.WideDeepClassifier(settings, dims)
        case config.DeepFm():
            return deep.DeepFmClassifier(settings, dims)
        case config.DcnV2():
            return deep.DcnV2Classifier(settings, dims)
        case config.MaskNet():
            return deep.MaskNetClassifier(settings, dims)
        case config.FinalMlp():
            return deep.FinalMlpClassifier(settings, dims)


def _products(settings: _ProductsConfig, dims: InputDims) -> Products:
    match settings:
        case config.Ipnn():
            return products.IpnnClassifier(settings, dims)
        case config.Opnn():
            return products.OpnnClassifier(settings, dims)
        case config.Pin():
            return products.PinClassifier(settings, dims)
        case config.Dlrm():
            return products.DlrmClassifier(settings, dims)
        case config.FiBiNet():
            return products.FiBiNetClassifier(settings, dims)


def _maps(settings: _MapsConfig, dims: InputDims) -> Maps:
    match settings:
        case config.Ccpm():
            return maps.CcpmClassifier(settings, dims)
        case config.XDeepFm():
            return maps.XDeepFmClassifier(settings, dims)
        case config.AutoInt():
            return maps.AutoIntClassifier(settings, dims)
