"""Wav2Vec2-Conformer from scratch: a book of notebooks that is also a library."""

from . import recordings as recordings  # registers the human speech sets that load_speech knows by name
from . import synthesis as synthesis  # registers "synthetic", hours of speech made on demand
from .audio import BatchFeature, Wav2Vec2FeatureExtractor, load_audio
from .classification import (
    SequenceClassifierOutput,
    TokenClassifierOutput,
    Wav2Vec2ConformerForAudioFrameClassification,
    Wav2Vec2ConformerForSequenceClassification,
)
from .config import Wav2Vec2ConformerConfig
from .ctc import CausalLMOutput, Wav2Vec2ConformerForCTC
from .decoding import CTCDecoder, NGramModel, beam_search
from .demo import load_demo
from .fairseq import convert_fairseq, load_fairseq, read_fairseq
from .fast import slow_down, speed_up
from .masking import compute_mask_indices
from .model import Wav2Vec2BaseModelOutput, Wav2Vec2ConformerModel
from .negatives import sample_negative_indices
from .pretraining import Wav2Vec2ConformerForPreTraining, Wav2Vec2ConformerForPreTrainingOutput
from .speaker import Wav2Vec2ConformerForXVector, XVectorOutput
from .speech import Utterance, load_dataset, load_speech
from .text import AutoFeatureExtractor, AutoProcessor, Wav2Vec2CTCTokenizer, Wav2Vec2Processor
from .tracing import block_map, masked_audio, parity_strip, spot_the_negative, trace
from .transcription import Transcript, transcribe

__version__ = "0.1.0"

__all__ = [
    "AutoFeatureExtractor",
    "AutoProcessor",
    "BatchFeature",
    "CTCDecoder",
    "CausalLMOutput",
    "NGramModel",
    "SequenceClassifierOutput",
    "TokenClassifierOutput",
    "Transcript",
    "Utterance",
    "Wav2Vec2BaseModelOutput",
    "Wav2Vec2CTCTokenizer",
    "Wav2Vec2ConformerConfig",
    "Wav2Vec2ConformerForAudioFrameClassification",
    "Wav2Vec2ConformerForCTC",
    "Wav2Vec2ConformerForPreTraining",
    "Wav2Vec2ConformerForPreTrainingOutput",
    "Wav2Vec2ConformerForSequenceClassification",
    "Wav2Vec2ConformerForXVector",
    "Wav2Vec2ConformerModel",
    "Wav2Vec2FeatureExtractor",
    "Wav2Vec2Processor",
    "XVectorOutput",
    "beam_search",
    "block_map",
    "compute_mask_indices",
    "convert_fairseq",
    "load_audio",
    "load_dataset",
    "load_demo",
    "load_fairseq",
    "load_speech",
    "masked_audio",
    "parity_strip",
    "read_fairseq",
    "sample_negative_indices",
    "slow_down",
    "speed_up",
    "spot_the_negative",
    "trace",
    "transcribe",
]
