"""Each metric's formula on videos whose answer is known, with stand-ins for the networks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from known_faces import KnownFaces

from ipvg_ray.metrics import cur_sim, dynamic_degree, face_distance, human_identity, imaging_quality
from ipvg_ray.metrics.aesthetic_quality import AestheticQuality
from ipvg_ray.metrics.clip_score import consisid, tpige
from ipvg_ray.metrics.dynamic_degree import DynamicDegree
from ipvg_ray.metrics.frames import Clip
from ipvg_ray.metrics.imaging_quality import ImagingQuality
from ipvg_ray.metrics.metric import Sampled, VideoMetric
from ipvg_ray.metrics.motion_smoothness import MotionSmoothness
from ipvg_ray.metrics.overall import WEIGHTS, overall
from ipvg_ray.metrics.overall_consistency import OverallConsistency
from ipvg_ray.metrics.pixels import CLIP_MEAN, CLIP_STD, vbench_clip
from ipvg_ray.metrics.video_faces import largest_faces


def alone(metric: VideoMetric, frames: np.ndarray, prompt: str = "") -> float | bool | None:
    """The score of one video."""
    (score,) = metric.score([Sampled(frames, prompt)])
    return score


def moving(pixels_per_frame: float, count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Each frame says in its first pixel by how many hundredths of a pixel the next one has moved."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:, :, :, 0], frames[:, :, :, 1] = divmod(round(pixels_per_frame * 100), 256)
    return frames


def flow_of_pixels(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """As told by `moving`, half of it to the right and the length made up downwards."""
    length = (first[:, 0] * 256 + first[:, 1]) / 100
    return torch.stack([0.6 * length, 0.8 * length], 1)


class TestDynamicDegree:
    def test_the_worked_case(self):
        assert dynamic_degree.threshold(480, 832) == 11.25
        assert dynamic_degree.pairs_needed(41) == 10

    @pytest.mark.parametrize(("pixels", "moves", "looked"), [(11.25, False, 31), (11.26, True, 10)])
    def test_the_worked_case_from_its_81_frames(self, pixels, moves, looked):
        sampled = Clip(np.broadcast_to(moving(pixels, 1, 480, 832), (81, 480, 832, 3)), 16).take(DynamicDegree.rule)
        assert len(sampled) == 41
        assert self.decide(sampled) == [(moves, looked)]

    @pytest.mark.parametrize(("sampled", "needed"), [(9, 2), (10, 2), (14, 4), (16, 4), (25, 6), (2, 0)])
    def test_pairs_needed_are_rounded_to_even(self, sampled, needed):
        assert dynamic_degree.pairs_needed(sampled) == needed

    def decide(self, *videos: np.ndarray, batch: int = 1) -> list[tuple[bool | None, int]]:
        """Of each video whether it moves, and how many pairs were looked at."""
        metric = DynamicDegree(flow_of_pixels, batch=batch)
        return [(found.moves, found.looked) for found in metric.decide([Sampled(frames) for frames in videos])]

    def test_a_still_video_does_not_move_and_ends_early(self):
        # Nine pairs are left then, and ten are needed.
        assert self.decide(moving(0, 41)) == [(False, 31)]

    @pytest.mark.parametrize(("speed", "moves"), [(1.49, False), (1.5, False), (1.51, True)])
    def test_steady_motion_around_the_threshold(self, speed, moves):
        # 6 · 64 / 256 = 1.5 pixels a pair
        assert self.decide(moving(speed, 41)) == [(moves, 10 if moves else 31)]

    def test_exactly_enough_pairs(self):
        for enough in (9, 10):
            frames = moving(0, 41)
            frames[:enough] = moving(30, enough)
            assert alone(DynamicDegree(flow_of_pixels), frames) is (enough == 10)

    def test_every_video_of_a_batch_ends_by_itself(self):
        videos = [moving(0, 41), moving(9, 41), moving(9, 21), moving(0, 1), moving(9, 2), moving(9, 41, 96, 64)]
        single = [found for video in videos for found in self.decide(video)]
        assert single == [(False, 31), (True, 10), (True, 5), (False, 0), (True, 1), (True, 10)]
        assert self.decide(*videos) == single
        for batch in (4, 16):
            assert [moves for moves, _ in self.decide(*videos, batch=batch)] == [moves for moves, _ in single]

    def test_a_batch_is_filled_with_pairs_of_the_videos_that_are_open(self):
        sizes = []

        def flow(first, second):
            sizes.append(len(first))
            return flow_of_pixels(first, second)

        found = DynamicDegree(flow, batch=8).decide([Sampled(moving(speed, 41)) for speed in (9, 0)])
        # Four pairs of each, until after twelve the first has its ten; then eight of the other, which ends after 36.
        assert sizes == [8, 8, 8, 8, 8, 8]
        assert [verdict.looked for verdict in found] == [12, 36]

    def test_the_fastest_twentieth_counts(self):
        flow = torch.zeros(1, 2, 20, 20)
        flow[0, 0, 0] = 8.0  # 20 of 400 pixels
        assert dynamic_degree.pair_scores(flow).item() == pytest.approx(8)
        flow[0, 0, 0, :10] = 0
        assert dynamic_degree.pair_scores(flow).item() == pytest.approx(4)

    def test_one_frame(self):
        assert self.decide(moving(9, 1)) == [(False, 0)]

    def test_frames_are_padded_to_eight(self):
        seen = []

        def flow(first, second):
            seen.append(tuple(first.shape))
            return flow_of_pixels(first, second)

        alone(DynamicDegree(flow, batch=2), moving(0, 3, 60, 90))
        assert seen == [(2, 3, 64, 96)]


def halfway(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first + second) / 2


class TestMotionSmoothness:
    def test_of_81_frames_40_are_predicted(self):
        seen = []

        def predict(first, second):
            seen.append(len(first))
            return halfway(first, second)

        alone(MotionSmoothness(predict), np.zeros((81, 16, 16, 3), np.uint8))
        assert sum(seen) == 40

    def test_what_is_predicted_exactly(self):
        frames = np.stack([np.full((20, 36, 3), 10 * i, np.uint8) for i in range(9)])
        assert alone(MotionSmoothness(halfway), frames) == 1.0

    def test_jumps(self):
        frames = np.zeros((9, 20, 36, 3), np.uint8)
        frames[1::2] = 51  # every odd frame is 51 off what lies between its neighbours
        assert alone(MotionSmoothness(halfway), frames) == pytest.approx(0.8)

    def test_predictions_are_cut_to_whole_numbers(self):
        frames = np.zeros((3, 16, 16, 3), np.uint8)
        frames[1], frames[2] = 10, 21  # 10.5 becomes 10
        assert alone(MotionSmoothness(halfway), frames) == 1.0

    @pytest.mark.parametrize("batch", [1, 3, 8])
    def test_batches_and_a_last_even_frame_change_nothing(self, batch):
        frames = np.random.default_rng(0).integers(0, 256, (12, 20, 36, 3), np.uint8)
        both = MotionSmoothness(halfway, batch=batch).score([Sampled(frames), Sampled(frames[:11])])
        assert {*both} == {alone(MotionSmoothness(halfway), frames)}

    def test_padding_is_taken_off_again(self):
        def corner(first, second):
            assert first.shape[2:] == (32, 48)
            assert torch.equal(first[..., 0, :], first[..., 6, :])  # six rows above: the first one again
            return halfway(first, second)

        frames = np.random.default_rng(0).integers(0, 256, (3, 20, 36, 3), np.uint8)
        assert alone(MotionSmoothness(corner), frames) < 1

    def test_two_frames_have_no_score(self):
        assert alone(MotionSmoothness(halfway), np.zeros((2, 16, 16, 3), np.uint8)) is None


class TestImagingQuality:
    def test_mean_over_frames_and_a_hundred(self):
        frames = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (51, 102, 255)])
        found = alone(ImagingQuality(lambda x: 100 * x.mean((1, 2, 3)), batch=2), frames)
        assert found == pytest.approx((0.2 + 0.4 + 1.0) / 3)

    def test_only_long_frames_shrink(self):
        assert imaging_quality.shrunk(torch.zeros(1, 3, 480, 832)).shape[2:] == (295, 512)
        assert imaging_quality.shrunk(torch.zeros(1, 3, 512, 300)).shape[2:] == (512, 300)


class TestClipPixels:
    def test_short_side_and_centre(self):
        frames = np.zeros((1, 48, 96, 3), np.uint8)
        frames[:, :, 24:72] = 255  # the middle square
        found = vbench_clip(frames, 48, "cpu", whole=True)
        white = torch.tensor([(1 - mean) / std for mean, std in zip(CLIP_MEAN, CLIP_STD, strict=True)])
        assert torch.allclose(found, white.view(1, 3, 1, 1).expand(1, 3, 48, 48))

    def test_only_floats_keep_what_overshoots(self):
        frames = np.zeros((1, 12, 12, 3), np.uint8)
        frames[:, :, 6:] = 255
        std, mean = torch.tensor(CLIP_STD).view(3, 1, 1), torch.tensor(CLIP_MEAN).view(3, 1, 1)
        kept, cut = (vbench_clip(frames, 24, "cpu", whole=whole)[0] * std + mean for whole in (False, True))
        assert kept.max() > 1.02
        assert cut.max() <= 1.0001
        assert torch.allclose(cut * 255, (cut * 255).round(), atol=1e-3)


class TestFaces:
    def test_cur_sim_of_a_face_kept_and_lost_halfway(self):
        class Net(torch.nn.Linear):
            def forward(self, x):
                return torch.stack([x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2))], 1)  # red, green

        red, green = (np.zeros((224, 224, 3), np.uint8) for _ in range(2))
        red[..., 0], red[..., 1] = 255, 127.5
        green[..., 1], green[..., 0] = 255, 127.5
        metric = cur_sim.CurSim(Net(1, 1), batch=3)
        dark = np.zeros((224, 224, 3), np.uint8)
        kept, halfway_lost, none, negative = [red] * 4, [red, red, green, green], [], [dark, red]
        found = metric.score([kept, halfway_lost, none, negative], [red] * 4)
        # A negative cosine counts as 0.
        assert found == pytest.approx([1, 0.5, 0, 0.5], abs=0.01)
        assert metric.score([[green], [red]], [green, green]) == pytest.approx([1, 0], abs=0.01)

    def test_face_distance_is_the_squared_distance(self):
        class Net(torch.nn.Linear):
            def forward(self, x):
                assert x.shape[2:] == (299, 299)
                return x.mean((2, 3))

        faces = [np.full((224, 224, 3), value, np.uint8) for value in (0, 51, 255)]
        metric = face_distance.FaceDistance(Net(1, 1))
        one, none = metric.score([faces, []], [faces[0], faces[0]])
        assert one == pytest.approx(3 * (0 + 0.2**2 + 1) / 3)
        assert none is None

    def test_a_face_found_with_the_border_is_moved_back(self):
        class Analyser(KnownFaces):
            def faces(self, rgb):
                if rgb.shape[0] == 100:
                    return []
                points = np.array([[60, 60], [100, 60], [80, 80], [65, 105], [95, 105]], np.float32)
                return [SimpleNamespace(box=np.array([0, 0, 1, 1]), landmarks_5=points, embedding=None)]

        frame = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
        (found,) = largest_faces(frame[None], Analyser())
        assert found.shift == (30, 25)

        class Direct(Analyser):
            def faces(self, rgb):
                face = super().faces(rgb[:1])[0]
                face.landmarks_5 = face.landmarks_5 - [30, 25]
                return [face]

        (direct,) = largest_faces(frame[None], Direct())
        assert found.aligned().shape == (224, 224, 3)
        assert (found.aligned() == direct.aligned()).all()


class Grey(torch.nn.Linear):
    """A feature that tells bright from dark faces."""

    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), torch.full((len(x),), 0.1)], 1)


class TestHumanIdentity:
    """Frames are filled with a value that says how bright their faces are; its last digit how many there are."""

    def score(self, *videos: list[int]) -> list[float | None]:
        def boxes(frames):
            return [[(10, 10, 50, 50)] * (int(frame[0, 0, 0]) % 10) for frame in frames]

        metric = human_identity.HumanIdentity(boxes, Grey(1, 1), batch=7)
        filled = [np.stack([np.full((60, 60, 3), value, np.uint8) for value in values]) for values in videos]
        return metric.score([Sampled(frames) for frames in filled])

    def test_kept_and_swapped_halfway(self):
        assert self.score([201] * 25, [251] * 13 + [1] * 12) == pytest.approx([1.0, 12 / 24])

    def test_other_numbers_of_faces_do_not_count(self):
        assert self.score([251] * 23 + [2, 0]) == [1.0]

    def test_too_few_frames_or_a_bad_first_one(self):
        enough, few, crowd = [251] * 21, [251] * 20, [252] + [251] * 29
        empty_between = [251] * 5 + [250] * 15 + [251] * 10
        assert self.score(enough, few, crowd, empty_between, [250]) == [1.0, None, None, None, None]

    def test_later_frames_of_a_video_without_an_anchor_are_not_looked_at(self):
        seen = []

        def boxes(frames):
            seen.extend(frames[:, 0, 0, 0].tolist())
            return [[]] * len(frames)

        frames = np.arange(30, dtype=np.uint8).repeat(12).reshape(30, 2, 2, 3)
        assert human_identity.HumanIdentity(boxes, Grey(1, 1)).score([Sampled(frames)] * 2) == [None, None]
        assert seen == [0, 0]

    def test_the_box_is_drawn_into_what_is_compared(self):
        frame = np.full((150, 150, 3), 100, np.uint8)
        found = human_identity._cut(frame, (10, 10, 138, 138))
        assert found.shape == (128, 128)
        assert (found[0, 64], found[64, 64]) == (150, 100)  # 0.587 · 255: green as a grey
        assert (frame == 100).all()

    def test_a_box_outside_the_frame_shows_no_face(self):
        assert human_identity._cut(np.zeros((60, 60, 3), np.uint8), (60, 10, 80, 30)) is None


class FakeClip:
    """Its picture feature is the mean colour, its text feature the colour that the text names."""

    logit_scale = torch.tensor(np.log(100.0))
    device = torch.device("cpu")
    config = SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=77), image_size=8)

    def __call__(self, pixel_values, input_ids=None, attention_mask=None):
        colours = torch.nn.functional.normalize(pixel_values.mean((2, 3)), dim=1)
        return SimpleNamespace(image_embeds=colours, text_embeds=input_ids)


def fake_processor(pictures, return_tensors, input_data_format):
    return {"pixel_values": torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255}


def fake_tokenizer(texts, **options):
    assert options["max_length"] == 77
    assert options["truncation"]
    named = torch.tensor([[float(text == colour) for colour in ("red", "green", "blue")] for text in texts])
    return {"input_ids": named, "attention_mask": torch.ones(len(texts), 3)}


class TestClipScore:
    red_and_blue = np.stack([np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255))])

    def test_the_two_variants(self):
        clip = (FakeClip(), fake_processor, fake_tokenizer)
        one, both = self.red_and_blue[:1], self.red_and_blue
        assert alone(tpige(clip), one, "red") == pytest.approx(1)
        assert alone(consisid(clip, swapped=False), both, "red") == pytest.approx(50)
        assert alone(consisid(clip), one, "red") == pytest.approx(0)
        assert alone(consisid(clip), one, "blue") == pytest.approx(100)

    def test_each_video_is_compared_with_its_own_prompt(self):
        clip = (FakeClip(), fake_processor, fake_tokenizer)
        red, blue = self.red_and_blue[:1], self.red_and_blue[1:]
        asked = [(red, "red"), (self.red_and_blue, "red"), (blue, "red"), (blue, "blue"), (red, "green")]
        found = tpige(clip).score([Sampled(frames, prompt) for frames, prompt in asked])
        assert found == pytest.approx([1, 0.5, 0, 1, 0])


class TestAestheticQuality:
    def test_mean_rating_over_ten(self):
        head = torch.nn.Linear(3, 1)
        head.load_state_dict({"weight": torch.tensor([[4.0, 0, 0]]), "bias": torch.tensor([2.0])})
        frames = np.zeros((3, 8, 8, 3), np.uint8)
        frames[:, :, :, 0] = 255
        metric = AestheticQuality(FakeClip(), head, batch=2)
        red = zip((1, 0, 0), CLIP_MEAN, CLIP_STD, strict=True)
        pixels = torch.tensor([(value - mean) / std for value, mean, std in red])
        share = (pixels[0] / pixels.norm()).item()
        assert alone(metric, frames) == pytest.approx((4 * share + 2) / 10, abs=1e-5)


class TestOverallConsistency:
    def tokens(self, count: int) -> list[int]:
        net = SimpleNamespace(sizes=SimpleNamespace(tokens=6))
        metric = OverallConsistency(net, lambda text, **_: {"input_ids": [7, *range(1, count + 1), 9]})  # type: ignore[arg-type]
        return metric.tokens("any").tolist()

    def test_texts_are_filled_up_or_cut_before_their_end(self):
        assert self.tokens(2) == [7, 1, 2, 9, 0, 0]
        assert self.tokens(4) == [7, 1, 2, 3, 4, 9]
        assert self.tokens(30) == [7, 1, 2, 3, 4, 9]


class TestOverall:
    def test_the_weights_sum_to_one(self):
        assert sum(WEIGHTS.values()) == pytest.approx(1)
        assert overall(dict.fromkeys(WEIGHTS, 1.0)) == pytest.approx(1)

    def test_a_known_sum(self):
        scores = {"gme_score": 0.6, "cur_sim": 0.5, "arc_sim": 0.4, "motion_smoothness": 0.98, "imaging_quality": 0.7}
        assert overall(scores) == pytest.approx(0.3 * 0.6 + 0.2 * 0.9 + 0.15 * 1.68)

    @pytest.mark.parametrize("name", WEIGHTS)
    def test_no_sum_of_some(self, name):
        assert overall({**dict.fromkeys(WEIGHTS, 1.0), name: None}) is None


def test_gme_on_the_miniature(tmp_path: Path):
    from ipvg_ray.metrics.gme_score import GmeScore
    from ipvg_ray.models.mini import metrics

    metrics._gme(tmp_path / metrics.GME, 0)
    metric = GmeScore(tmp_path / metrics.GME, tokens=(4, 16), batch=2)
    frames = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), np.uint8)
    prompts = ["a man in a red coat", "a dog that runs along a beach in the evening", "rain"]
    texts, pictures = metric.embed_texts(prompts), metric.embed_pictures(frames)
    assert torch.allclose(pictures.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(metric.embed_pictures(frames[1:2])[0], pictures[1], atol=1e-5)
    for text, prompt in zip(texts, prompts, strict=True):  # whatever stands behind it in a batch
        assert torch.allclose(metric.embed_texts([prompt])[0], text, atol=1e-5)
    assert not torch.allclose(texts[0], texts[1], atol=1e-3)
    found = metric.score([Sampled(frames, prompt) for prompt in prompts])
    assert found == pytest.approx((pictures @ texts.T).mean(0).tolist(), abs=1e-5)
    asked: dict = {}
    hooks = [
        metric.model.visual.register_forward_pre_hook(
            lambda net, given, named: asked.update(pixels=given[0], grid=named["grid_thw"]), with_kwargs=True
        ),
        metric.model.get_input_embeddings().register_forward_pre_hook(lambda net, given: asked.update(ids=given[0])),
    ]
    embedded = metric.embed_pictures(frames[:1])
    for hook in hooks:
        hook.remove()
    with torch.no_grad():  # transformers' own forward, told to count picture tokens as GME does
        ids = asked["ids"]
        states = metric.model(
            input_ids=ids,
            pixel_values=asked["pixels"],
            image_grid_thw=asked["grid"],
            position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
        )
    wanted = torch.nn.functional.normalize(states.last_hidden_state[:, -1], dim=1)
    assert torch.allclose(embedded, wanted, atol=1e-5)
