"""Means, intervals, comparisons, gates and tables of scores."""

from __future__ import annotations

import csv
import io

import pyarrow as pa
import pytest

from ipvg_ray import config
from ipvg_ray.cli_evaluate import merged
from ipvg_ray.experiments import EXPERIMENTS, Experiment, ExperimentError, find
from ipvg_ray.experiments.layout import folder_of
from ipvg_ray.report import table_page, tabulate
from ipvg_ray.report.scored import Scored, skipped_reasons
from ipvg_ray.report.statistics import Gate, GateError, mean_of, paired
from ipvg_ray.stages import make_stages


def of(*values: float) -> dict[str, float]:
    return {f"s{number:03}": value for number, value in enumerate(values)}


class TestMean:
    def test_the_interval_of_a_normal_sample(self):
        import numpy as np

        values = np.random.default_rng(1).normal(0.5, 0.1, 400)
        found = mean_of(of(*values))
        half = 1.96 * values.std() / 20
        assert found.mean == pytest.approx(values.mean())
        assert found.low == pytest.approx(values.mean() - half, abs=half * 0.1)
        assert found.high == pytest.approx(values.mean() + half, abs=half * 0.1)

    def test_few_values(self):
        assert mean_of({}).mean is None
        one = mean_of(of(0.3))
        assert (one.mean, one.low) == (0.3, None)
        assert mean_of(of(1, float("nan"))).count == 1

    def test_the_same_every_time(self):
        values = of(*(number % 7 for number in range(50)))
        assert mean_of(values) == mean_of(values)


class TestPairing:
    def test_only_shared_samples(self):
        found = paired({"a": 1.0, "b": 2.0, "c": 9.0}, {"a": 2.0, "b": 2.0, "d": 0.0})
        assert (found.count, found.difference.mean, found.wins) == (2, 0.5, 0.75)

    def test_lower_may_be_better(self):
        assert paired(of(5, 5), of(4, 3), lower_is_better=True).wins == 1.0

    def test_exact_p_of_a_sign_flip(self):
        # Of 2^5 signs only all plus and all minus reach the mean: 2 / 32
        assert paired(of(0, 0, 0, 0, 0), of(1, 1, 1, 1, 1)).p == pytest.approx(2 / 32)
        assert paired(of(0, 0), of(1, -1)).p == 1.0

    def test_sampled_p(self):
        zeros = of(*[0.0] * 40)
        assert paired(zeros, of(*[1.0] * 40)).p < 0.001
        assert paired(zeros, of(*[(-1.0) ** number for number in range(40)])).p > 0.9

    def test_nothing_shared(self):
        found = paired({"a": 1.0}, {"b": 1.0})
        assert (found.count, found.p, found.wins) == (0, None, None)

    def test_an_identitys_prompts_are_drawn_together(self):
        """Five copies of each of ten values tell no more than the ten do."""
        values = {f"id{i}/p{k}": float(i % 5) for i in range(10) for k in range(5)}
        owners = {sample: sample.partition("/")[0] for sample in values}
        alone = mean_of({f"id{i}/p0": float(i % 5) for i in range(10)})
        together = mean_of(values, owners)
        assert (together.low, together.high) == (alone.low, alone.high)
        assert mean_of(values).high < together.high

    def test_an_identitys_differences_are_flipped_together(self):
        zeros = {f"id{i}/p{k}": 0.0 for i in range(3) for k in range(10)}
        owners = {sample: sample.partition("/")[0] for sample in zeros}
        assert paired(zeros, dict.fromkeys(zeros, 1.0), owners=owners).p == pytest.approx(2 / 8)

    def test_means_are_over_shared_samples(self):
        found = paired({"a": 1.0, "b": 2.0, "c": 9.0}, {"a": 2.0, "b": 2.0, "d": 0.0})
        assert (found.first, found.second, found.only_first, found.only_second) == (1.5, 2.0, 1, 1)


class TestGate:
    found = {"arc_sim": paired(of(0.5, 0.5), of(0.48, 0.48))}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("text", "holds"),
        [("arc_sim<-0.01", True), ("arc_sim<-0.03", False), ("arc_sim>-0.03", True), ("arc_sim > 1e-3", False)],
    )
    def test_bounds(self, text, holds):
        assert Gate.read(text).holds(self.found) is holds

    @pytest.mark.parametrize("text", ["arc_sim", "arc_sim=3", "arc_sim<", "<0.1", "arc_sim<1.2.3"])
    def test_what_is_no_gate(self, text):
        with pytest.raises(GateError, match=r"such as arc_sim<-0.01"):
            Gate.read(text)

    def test_lost_samples_pass_no_gate(self):
        found = {"arc_sim": paired(of(0.5, 0.5, 0.5), of(0.5, 0.5))}
        with pytest.raises(GateError, match=r"1 samples have arc_sim in the first run alone; .* --allow-missing"):
            Gate.read("arc_sim<-0.01").holds(found)
        assert not Gate.read("arc_sim<-0.01").holds(found, allow_missing=True)
        more = {"arc_sim": paired(of(0.5), of(0.5, 0.1))}
        assert not Gate.read("arc_sim<-0.01").holds(more)

    def test_a_score_that_is_not_there(self):
        with pytest.raises(GateError, match="share no sample with a value of cur_sim"):
            Gate.read("cur_sim<0").holds(self.found)


def scored(name: str, shift: float = 0.0) -> Scored:
    scores = {
        "arc_sim": of(*(0.2 + shift + 0.01 * number for number in range(10))),
        "face_distance": of(*(200 - 100 * shift + number for number in range(10))),
        "dynamic_degree": of(1, 0),
    }
    samples = [*scores["arc_sim"], "missing"]
    return Scored(name, scores, samples, {"missing_video": ["missing"]}, {"gme_score: no model": 10})


METRICS = ("arc_sim", "face_distance", "dynamic_degree", "gme_score")
TABLE = tabulate.Table("Two runs", [scored("plain"), scored("better|&", 0.1)], METRICS, {"plain": {"arc_sim": 0.238}})


class TestTables:
    def test_missing_ones_count_as_zero_where_more_is_better(self):
        run = scored("a")
        assert run.counted("arc_sim") == pytest.approx(sum(run.scores["arc_sim"].values()) / 11)
        assert run.counted("face_distance") is None
        assert run.counted("gme_score") is None

    def test_videos_on_which_a_metric_is_not_defined_do_not_count_as_zero(self):
        scores = {"human_identity": {"a/1": 1.0, "a/2": 0.5}}
        run = Scored("a", scores, ["a/1", "a/2", "a/3", "a/4"], finished=frozenset({"a/1", "a/2", "a/3"}))
        assert run.counted("human_identity") == pytest.approx((1 + 0.5 + 0) / 3)

    def test_markdown(self):
        text = tabulate.markdown(TABLE)
        assert "| plain | 10 of 11 | 0.245 [" in text
        assert "| *paper: plain* |  | 0.238 |" in text
        assert "| better\\|& | Arc-Sim | 10 | 0.100 [0.100, 0.100] | 0.0020 | 100% |" in text
        assert "- plain, not scored: gme_score: no model (10 videos)" in text
        assert "- plain, failed: missing_video (1)" in text
        widths = {line.count("|") - line.count("\\|") for line in text.splitlines()[2:7]}
        assert widths == {len(METRICS) + 3}

    def test_csv(self):
        rows = list(csv.DictReader(io.StringIO(tabulate.as_csv(TABLE))))
        assert len(rows) == 2 * len(METRICS)
        assert float(rows[0]["mean"]) == pytest.approx(0.245)
        assert (rows[0]["paper"], rows[3]["mean"]) == ("0.238", "")
        samples = list(csv.DictReader(io.StringIO(tabulate.samples_csv(TABLE))))
        assert len(samples) == 22
        assert samples[10]["arc_sim"] == ""
        assert float(samples[11]["arc_sim"]) == pytest.approx(0.3)

    def test_comparisons_csv(self):
        arc, distance, degree = csv.DictReader(io.StringIO(tabulate.comparisons_csv(TABLE)))
        assert (arc["run"], arc["against"], arc["metric"], arc["samples"]) == ("better|&", "plain", "arc_sim", "10")
        numbers = [float(arc[name]) for name in ("mean_against", "mean", "difference", "low", "high", "wins")]
        assert numbers == pytest.approx([0.245, 0.345, 0.1, 0.1, 0.1, 1.0])
        assert float(arc["p"]) < 0.01
        assert float(distance["difference"]) == pytest.approx(-10)
        assert (float(distance["wins"]), float(degree["wins"])) == (1.0, 0.5)

    def test_latex(self):
        text = tabulate.latex(TABLE)
        assert r"plain & 0.245 (0.238) & 204.5 & \textbf{0.500} & -- \\" in text
        assert r"better|\& & \textbf{0.345} & \textbf{194.5}" in text

    def test_page(self):
        text = table_page.page(TABLE)
        assert text.count("<svg") == 3 * 2  # none for a score that nobody has
        assert text.count('class="paper" cx') == 1
        assert "better|&amp;" in text
        assert "<td>0.100 [0.100, 0.100]</td>" in text
        assert "Not scored: gme_score: no model <small>plain (10), better|&amp; (10)" in text
        assert "Failed: missing_video <small>plain (1), better|&amp; (1)" in text
        assert "http" not in text.replace("http-equiv", "")

    def test_places_in_plots(self):
        arc, distance, degree = table_page.plots(TABLE)
        # Nine tenths of the videos' values reach further than the intervals of the means.
        assert (arc.marks[0].band[0], arc.marks[1].band[1]) == (0, 100)
        assert all(m.band[0] < m.low < m.mean < m.high < m.band[1] for plot in (arc, distance) for m in plot.marks)
        assert (arc.marks[0].paper, arc.marks[1].paper) == (pytest.approx(100 * 0.0335 / 0.181, abs=0.01), None)
        assert [float(arc.left), float(arc.right)] == pytest.approx([0.2045, 0.3855], abs=1e-3)
        assert [mark.text for mark in arc.marks] == ["0.245", "0.345"]
        assert [plot.lower_is_better for plot in (arc, distance, degree)] == [False, True, False]
        single = Scored("one", {"arc_sim": {"a/1": 0.5}}, ["a/1"])
        (plot,) = table_page.plots(tabulate.Table("One", [single], METRICS))
        assert (plot.marks[0].mean, plot.marks[0].band, plot.left) == (50, (50, 50), "")

    def test_reasons_are_counted(self):
        found = skipped_reasons(pa.table({"skipped": ["a: x; b: y", "a: x", None]}))
        assert skipped_reasons(pa.table({"other": [1]})) == {}
        assert found == {"a: x": 2, "b: y": 1}


class TestExperiments:
    def test_the_papers_numbers(self):
        first, second = EXPERIMENTS["table1"].variants
        assert (first.paper["arc_sim"], second.paper["dynamic_degree"]) == (0.238, 0.848)
        means = {variant.name: variant.paper["arc_sim"] for variant in EXPERIMENTS["table2"].variants}
        assert means == {
            "VACE-14B raw": 0.208,
            "VACE-14B refined": 0.246,
            "Wan-1.3B raw": 0.166,
            "Wan-1.3B refined": 0.198,
        }

    def test_the_ablation_can_be_configured(self):
        for variant in EXPERIMENTS["table2"].variants:
            settings = config.load("gpu", values={**EXPERIMENTS["table2"].shared, **variant.values})
            assert settings.prompts.method == ("raw" if variant.name.endswith("raw") else "ipvg_std")
            assert ("1.3B" in settings.video.model) is ("1.3B" in variant.name)
            assert settings.dataset.limit == 25

    def test_tpige_begins_from_the_reference_that_the_first_frame_stage_draws(self):
        for variant in EXPERIMENTS["tpige"].variants:
            shared = config.load("gpu", values=EXPERIMENTS["tpige"].shared)
            settings = config.updated(shared.model_dump(mode="json"), [], variant.values)
            stages = {stage.name: stage for stage in make_stages(settings)}
            assert "first_frame" in stages
            assert "reference_picture" in stages["video"].needs

    @pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
    def test_every_row_can_be_configured(self, experiment: Experiment):
        for variant in experiment.variants:
            config.load("gpu", values=merged(experiment.shared, variant.values))

    def test_what_tells_rows_apart_is_not_set_for_all(self):
        with pytest.raises(ExperimentError, match=r"the row 'R2V' sets video\.task itself"):
            EXPERIMENTS["table1"].refuse_overrides(["seed=1", "video.task=vace-i2v"])
        with pytest.raises(ExperimentError, match=r"video\.tpige\.mode itself"):
            EXPERIMENTS["tpige"].refuse_overrides(["video.tpige={}"])
        EXPERIMENTS["table1"].refuse_overrides(["video.steps=4", "dataset.limit=2"])

    @pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
    def test_names_and_metrics(self, experiment: Experiment):
        folders = [folder_of(variant.name) for variant in experiment.variants]
        assert len(set(folders)) == len(folders)
        from ipvg_ray import schema

        assert set(experiment.metrics) <= set(schema.table("evaluate").columns)
        for variant in experiment.variants:
            assert set(variant.paper) <= set(experiment.metrics)

    def test_folder_names(self):
        assert folder_of("T2I→I2V") == "t2i-to-i2v"
        assert folder_of("VACE-14B raw") == "vace-14b-raw"

    def test_a_file(self, tmp_path):
        text = "title: Steps\nmetrics: [arc_sim]\nshared: {seed: 1}\nvariants:\n"
        text += "- {name: few, set: {video: {steps: 4}}}\n- {name: many, paper: {arc_sim: 0.3}}\n"
        (tmp_path / "steps.yaml").write_text(text)
        found = find(str(tmp_path / "steps.yaml"))
        assert (found.title, found.metrics, found.shared) == ("Steps", ("arc_sim",), {"seed": 1})
        assert found.variants[0].values == {"video": {"steps": 4}}
        assert found.variants[1].paper == {"arc_sim": 0.3}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("title: x", "no list `variants`"),
            ("variants: [{set: {}}]", "variant 1 has no name"),
            ("variants: [{name: a, sets: {}}]", r"has \['sets'\]"),
            ("variants: [{name: a}, {name: a}]", "one name"),
            ("metrics: [arc]\nvariants: [{name: a}]", "no score is called 'arc'"),
            ("variants: [", "cannot read"),
        ],
    )
    def test_bad_files(self, tmp_path, text, message):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ExperimentError, match=message):
            find(str(tmp_path / "bad.yaml"))

    def test_an_unknown_name(self):
        with pytest.raises(ExperimentError, match="there are table1, table2, tpige"):
            find("table3")
