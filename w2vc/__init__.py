"""Wav2Vec2-Conformer from scratch: a book of notebooks that is also a library."""

from .config import Wav2Vec2ConformerConfig
from .data import recordings as recordings  # registers the human speech sets that load_speech knows by name
from .data import synthesis as synthesis  # registers "synthetic", hours of speech made on demand
from .data.audio import BatchFeature, Wav2Vec2FeatureExtractor, load_audio
from .data.corpus import Utterance, load_dataset, load_speech
from .explore.tracing import block_map, layerwise_diff, masked_audio, spot_the_negative, trace
from .files.fairseq import convert_fairseq, load_fairseq, read_fairseq
from .model.classification import (
    SequenceClassifierOutput,
    TokenClassifierOutput,
    Wav2Vec2ConformerForAudioFrameClassification,
    Wav2Vec2ConformerForSequenceClassification,
)
from .model.ctc import CausalLMOutput, Wav2Vec2ConformerForCTC
from .model.fast import slow_down, speed_up
from .model.masking import compute_mask_indices
from .model.negatives import sample_negative_indices
from .model.pretraining import Wav2Vec2ConformerForPreTraining, Wav2Vec2ConformerForPreTrainingOutput
from .model.speaker import Wav2Vec2ConformerForXVector, XVectorOutput
from .model.wav2vec2 import Wav2Vec2BaseModelOutput, Wav2Vec2ConformerModel
from .text.decoding import CTCDecoder, NGramModel, beam_search
from .text.tokenizer import AutoFeatureExtractor, AutoProcessor, Wav2Vec2CTCTokenizer, Wav2Vec2Processor
from .text.transcription import Transcript, transcribe
from .training.demo import load_demo

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
    "layerwise_diff",
    "read_fairseq",
    "sample_negative_indices",
    "slow_down",
    "speed_up",
    "spot_the_negative",
    "trace",
    "transcribe",
]
