"""Shoppers: the score on the real sessions, against gradient boosting on the same split."""

import json

import h5py
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score


def test_the_score_holds_against_gradient_boosting(hpcai, shared_data, tmp_path):
    (tmp_path / "online_shoppers.csv").symlink_to(shared_data / "online_shoppers.csv")
    assert hpcai("preprocess", "shoppers", "--source", tmp_path, "--output", "shoppers.h5").exit_code == 0
    done = hpcai("train", "shoppers", "--data", "shoppers.h5", "--json")
    assert done.exit_code == 0, done.stderr
    metrics = json.loads(done.stdout)["metrics"]
    with h5py.File("shoppers.h5") as file:
        (inputs, labels), (test_inputs, test_labels) = (
            (file[split]["features"][:], file[split]["labels"][:]) for split in ("train", "test"))
    peer = HistGradientBoostingClassifier(random_state=0).fit(inputs, labels)
    peer_roc_auc = roc_auc_score(test_labels, peer.predict_proba(test_inputs)[:, 1])
    assert metrics["roc_auc"] >= max(0.92, peer_roc_auc - 0.01)
    assert metrics["average_precision"] > 0.65


def test_the_sample_trains(hpcai):
    done = hpcai("train", "shoppers", "--epochs", 4, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["roc_auc"] > 0.7
