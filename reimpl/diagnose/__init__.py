"""What is wrong with a model: its signals and gradients, where its errors come from, which of several to take."""

from reimpl.diagnose.analysis import Cause, ErrorAnalysis, LabelNoise, error_analysis, label_noise
from reimpl.diagnose.budget import ErrorBudget, error_budget
from reimpl.diagnose.curves import LearningCurve, learning_curve
from reimpl.diagnose.gradients import GradientCheck, ParameterCheck, gradient_check
from reimpl.diagnose.metrics import Selection, cost_weighted_error, f1_score, select
from reimpl.diagnose.signals import LayerSignal, SignalReport, signal_report

__all__ = [
    "Cause",
    "ErrorAnalysis",
    "ErrorBudget",
    "GradientCheck",
    "LabelNoise",
    "LayerSignal",
    "LearningCurve",
    "ParameterCheck",
    "Selection",
    "SignalReport",
    "cost_weighted_error",
    "error_analysis",
    "error_budget",
    "f1_score",
    "gradient_check",
    "label_noise",
    "learning_curve",
    "select",
    "signal_report",
]
