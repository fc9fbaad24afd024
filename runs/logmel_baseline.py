"""The baseline of docs/results.md, without asda: scikit-learn's logistic regression on torchaudio's log-mel.

    python runs/logmel_baseline.py ../shared/data/env --task esc10 --out logmel.json

A clip is the mean and the standard deviation over time of its 128 log-mel bins, standardised on the training clips.
Each fold is held out once; the penalty is chosen by cross-validation over the other folds. Needs the extra dev.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

SAMPLE_RATE_HZ = 16000
PENALTIES = [0.01, 0.1, 1.0]  # scikit-learn's C, its inverse


def statistics_of(path: Path) -> np.ndarray:
    """Return the mean and the standard deviation of each log-mel bin, [256]."""
    samples_SC, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    mono_1S = torch.from_numpy(samples_SC.mean(1)).reshape(1, -1)
    mono_1S = torchaudio.functional.resample(mono_1S, rate_hz, SAMPLE_RATE_HZ)
    mel_TM = torchaudio.compliance.kaldi.fbank(
        mono_1S - mono_1S.mean(),
        sample_frequency=SAMPLE_RATE_HZ,
        num_mel_bins=128,
        window_type="hanning",
        dither=0.0,
        htk_compat=True,
        use_energy=False,
    ).numpy()
    return np.concatenate([mel_TM.mean(0), mel_TM.std(0)])


def main() -> None:
    """Fit and evaluate, a line for each fold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="recordings, and a table named like the folder: env/env.csv")
    parser.add_argument("--task", required=True, help="use the rows with this value in the column task")
    parser.add_argument("--out", required=True, type=Path, help="JSON: the accuracy on each fold")
    args = parser.parse_args()
    path = args.folder / f"{args.folder.name}.csv"
    if not path.is_file():
        parser.error(f"{path} is missing; give a folder of recordings that holds a table of the same name")
    with path.open(newline="", encoding="utf-8") as table:
        rows = [row for row in csv.DictReader(table) if row["task"] == args.task]
    if not rows:
        parser.error(f"--task {args.task}: no row of {path} has this value in the column task")
    features_ND = np.stack([statistics_of(args.folder / row["path"]) for row in rows])
    labels_N, folds_N = (np.array([row[name] for row in rows]) for name in ("label", "fold"))
    shares: dict[str, float] = {}
    for fold in sorted(set(folds_N)):
        train_N = folds_N != fold
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        model = GridSearchCV(classifier, {"logisticregression__C": PENALTIES}, cv=LeaveOneGroupOut())
        model.fit(features_ND[train_N], labels_N[train_N], groups=folds_N[train_N])
        shares[f"fold{fold}"] = float(model.score(features_ND[~train_N], labels_N[~train_N]))
        print(f"fold{fold}  accuracy {100 * shares[f'fold{fold}']:.1f} %  of {int((~train_N).sum())}")
    print(f"mean   accuracy {100 * statistics.fmean(shares.values()):.1f} %")
    args.out.write_text(json.dumps(shares, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
