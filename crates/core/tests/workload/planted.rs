//! Needles and groups: what exact attention reads, and what hides them from whom.

use super::*;

#[test]
fn a_needle_is_read_out_by_exact_attention_and_not_without_it() {
    let shape = shape(5, 4, 1);
    let n = 4096;
    let rope = Rope::new(&shape, n + 20);
    let workload = plan("needle", &shape, n, 20, 11);
    let (mut depths, mut lost, mut reads) = (Vec::new(), 0, 0);
    for layer in 0..5 {
        let head = workload.calibrate(layer, 0);
        let needle = head.needle().expect("a needle head").clone();
        depths.push(needle.positions[0] as f64 / n as f64);
        let (keys, values) = context(&head, &rope);
        for s in [0, 7, 19] {
            let (queries, ..) = step(&head, &rope, s);
            for (query, odds) in queries.chunks_exact(D).zip(&needle.log_odds) {
                let mut weights = softmax(query, &keys);
                if *odds >= 0.0 {
                    let read = head.readout(&output(&weights, &values, D));
                    assert_eq!(read, Some(needle.answers.clone()), "layer {layer} step {s} odds {odds}");
                }
                weights[needle.positions[0]] = 0.0;
                let left: f64 = weights.iter().sum();
                weights.iter_mut().for_each(|w| *w /= left);
                reads += 1;
                lost += usize::from(head.recall(&output(&weights, &values, D)) != Some(1.0));
            }
        }
        assert_eq!(head.readout(&[f32::NAN; D]), None);
    }
    assert!(
        depths.iter().zip([0.1, 0.3, 0.5, 0.7, 0.9]).all(|(got, want)| (got - want).abs() < 0.001),
        "{depths:?}"
    );
    assert!(lost * 10 > reads * 7, "without the needle only chance names its value: {lost} of {reads} lost");
    assert!(plan("content", &shape, n, 1, 1).calibrate(0, 0).needle().is_none());
}

/// A head with what is planted, its rows, and its queries of some steps.
struct Case {
    head: HeadWorkload,
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<Vec<f32>>,
}

impl Case {
    fn new(text: &str, n: usize, seed: u64) -> Self {
        let shape = shape(1, 4, 1);
        let rope = Rope::new(&shape, n + 12);
        let head = plan(text, &shape, n, 12, seed).calibrate(0, 0);
        let (keys, values) = context(&head, &rope);
        let queries = [0, 5, 11].map(|s| step(&head, &rope, s).0).to_vec();
        Self { head, keys, values, queries }
    }

    /// Softmax weights of one head of the group at each step.
    fn weights(&self, head: usize) -> Vec<Vec<f64>> {
        self.queries.iter().map(|q| softmax(&q[head * D..][..D], &self.keys)).collect()
    }

    /// Mean recall of exact attention for one head of the group.
    fn recall(&self, head: usize) -> f64 {
        let outputs = self.weights(head).into_iter().map(|weights| output(&weights, &self.values, D));
        mean(outputs.map(|out| self.head.recall(&out).expect("planted")))
    }
}

#[test]
fn exact_attention_reads_every_variant() {
    for n in [2048, 9000] {
        for text in [
            "needle:margin=2,depth=0",
            "needle:margin=0,depth=0.9,channels=sparse",
            "needle:margin=0,channels=thin",
            "needle:margin=2,needles=4",
            "needle:margin=2,distractors=4",
            "needle:margin=2,distractors=many",
            "needle:margin=4,distractors=many,needles=4",
            "needle:margin=0,hide=mean,outliers=yes,drift=yes",
            "needle:margin=2,hide=outlier,asked=steps,group=same,steps=iid",
            "aggregation",
        ] {
            let case = Case::new(text, n, 3);
            let needle = case.head.needle().expect("planted").clone();
            let odds = needle.log_odds[0];
            assert!(needle.log_odds.iter().all(|o| *o == odds), "{text}");
            for head in [0, 3] {
                let recall = case.recall(head);
                assert!(recall > 0.95, "{text} at {n}: recall {recall}");
                // The mass of all that is planted is the solved one.
                let all = case.weights(head);
                let mass = mean(all.iter().map(|w| needle.positions.iter().map(|p| w[*p]).sum::<f64>()));
                let target = 1.0 / (1.0 + (-odds).exp());
                assert!((mass - target).abs() < 0.05, "{text} at {n}: mass {mass} for {target}");
            }
            // Without what is planted, the answer cannot be read.
            let lost = mean(case.weights(3).into_iter().map(|mut weights| {
                needle.positions.iter().for_each(|p| weights[*p] = 0.0);
                let left: f64 = weights.iter().sum();
                weights.iter_mut().for_each(|w| *w /= left);
                case.head.recall(&output(&weights, &case.values, D)).expect("planted")
            }));
            let chance = needle.answers.len() as f64 / needle.candidates as f64;
            assert!(lost < chance + 0.35, "{text} at {n}: recall {lost} of what is not there");
        }
    }
}

#[test]
fn four_needles_weigh_the_same_and_distractors_look_like_them() {
    let case = Case::new("needle:margin=2,needles=4,depth=0.1", 4096, 1);
    let needle = case.head.needle().expect("planted");
    assert_eq!((needle.positions.len(), needle.answers.len()), (4, 4));
    assert!(needle.positions.windows(2).all(|w| w[1] - w[0] > 1000), "{:?}", needle.positions);
    for weights in case.weights(2) {
        let masses: Vec<f64> = needle.positions.iter().map(|p| weights[*p]).collect();
        let (low, high) = masses.iter().fold((1.0f64, 0.0f64), |(l, h), m| (l.min(*m), h.max(*m)));
        assert!(high < 1.001 * low && masses.iter().sum::<f64>() > 0.8, "{masses:?}");
    }
    // Of 64 distractors most stand among the 2 % of the tokens that a query sees best; none is above the needle.
    let case = Case::new("needle:margin=4,distractors=many", 4096, 1);
    let needle = case.head.needle().expect("planted").positions[0];
    let plain = Case::new("needle:margin=4", 4096, 1);
    let replaced: Vec<usize> =
        (4..4096).filter(|t| case.keys[t * D..][..D] != plain.keys[t * D..][..D]).collect();
    assert!((55..=64).contains(&replaced.len()), "{} distractors", replaced.len());
    for weights in case.weights(0) {
        let mut sorted = weights.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let seen = replaced.iter().filter(|t| weights[**t] >= sorted[4096 / 50]).count();
        assert!(seen * 2 > replaced.len(), "{seen} of {} distractors are seen", replaced.len());
        assert_eq!(weights[needle], sorted[0]);
    }
}

/// Share of the pages of 16 whose score is above that of the needle's page: `q . mean(page)`, and the sum over channels of
/// the largest product with a key of the page's box (Quest).
fn ranks(case: &Case) -> [f64; 2] {
    let page = case.head.needle().expect("planted").positions[0] / 16;
    let query = &case.queries[1][..D];
    let scores = |score: fn(&[f32], &[f32]) -> f64| {
        let all: Vec<f64> = case.keys.chunks_exact(16 * D).map(|rows| score(query, rows)).collect();
        all.iter().filter(|s| **s > all[page]).count() as f64 / all.len() as f64
    };
    let by_mean = |query: &[f32], rows: &[f32]| rows.chunks_exact(D).map(|k| dot(query, k)).sum();
    let by_box = |query: &[f32], rows: &[f32]| {
        let products = |c: usize| rows.chunks_exact(D).map(move |k| f64::from(query[c] * k[c]));
        (0..D).map(|c| products(c).fold(f64::NEG_INFINITY, f64::max)).sum()
    };
    [scores(by_mean), scores(by_box)]
}

#[test]
fn a_hidden_needle_is_lost_to_page_means_and_not_to_boxes() {
    let mean_ranks = |text: &str| {
        let all: Vec<[f64; 2]> = (0..6).map(|seed| ranks(&Case::new(text, 4096, seed))).collect();
        [0, 1].map(|i| mean(all.iter().map(|r| r[i])))
    };
    let plain = mean_ranks("needle:margin=4");
    let hidden = mean_ranks("needle:margin=4,hide=mean");
    let beside = mean_ranks("needle:margin=4,hide=outlier");
    assert!(plain[0] < 0.4, "{plain:?} {hidden:?} {beside:?}");
    assert!(hidden[0] > plain[0] + 0.1 && beside[0] > 0.6, "{plain:?} {hidden:?} {beside:?}");
    assert!([plain, hidden, beside].iter().all(|r| r[1] < 0.1), "{plain:?} {hidden:?} {beside:?}");
}

#[test]
fn channels_decide_what_a_few_of_them_see() {
    // Share of the needle's logit over the average token's that the 32 channels with the largest |q| hold.
    let share = |text: &str| {
        mean((0..6).map(|seed| {
            let case = Case::new(text, 2048, seed);
            let at = case.head.needle().expect("planted").positions[0];
            let query = &case.queries[1][..D];
            let products: Vec<(f32, f64)> = (0..D)
                .map(|c| {
                    let average = mean(case.keys.chunks_exact(D).skip(4).map(|k| f64::from(k[c])));
                    (query[c].abs(), f64::from(query[c]) * (f64::from(case.keys[at * D + c]) - average))
                })
                .collect();
            let mut order = products.clone();
            order.sort_by(|a, b| b.0.total_cmp(&a.0));
            order[..32].iter().map(|p| p.1).sum::<f64>() / products.iter().map(|p| p.1).sum::<f64>()
        }))
    };
    let [sparse, spread, thin] = ["sparse", "spread", "thin"].map(|c| share(&format!("needle:channels={c}")));
    let apart = sparse > spread + 0.1 && spread > thin + 0.1;
    assert!(sparse > 0.85 && thin < 0.7 && apart, "{sparse} {spread} {thin}");
}

#[test]
fn outliers_and_drift_change_keys_and_no_output() {
    let n = 4096;
    let plain = Case::new("diffuse", n, 2);
    let drift = Case::new("diffuse:drift=yes", n, 2);
    assert!(plain.weights(1) == drift.weights(1));
    let centre = |case: &Case, half: usize| -> Vec<f32> {
        let rows = case.keys[half * (n / 2) * D..][..(n / 2) * D].chunks_exact(D);
        let mut sum = vec![0.0f32; D];
        rows.for_each(|row| sum.iter_mut().zip(row).for_each(|(s, x)| *s += x / (n / 2) as f32));
        sum
    };
    let moved = |case: &Case| {
        let (a, b) = (centre(case, 0), centre(case, 1));
        a.iter().zip(&b).map(|(x, y)| f64::from((x - y) * (x - y))).sum::<f64>().sqrt()
    };
    assert!(moved(&drift) > moved(&plain) + 3.0, "{} {}", moved(&drift), moved(&plain));
    let outliers = Case::new("diffuse:outliers=yes", n, 2);
    let large: Vec<usize> = (0..n)
        .filter(|t| {
            let row = &outliers.keys[t * D..][..D];
            dot(row, row).sqrt() > 55.0
        })
        .collect();
    assert!((25..60).contains(&large.len()), "{} outliers", large.len());
    assert!(outliers.weights(0).iter().all(|w| large.iter().all(|t| w[*t] < 1e-15)));
}

#[test]
fn groups_are_counted_and_the_prompt_may_be_silent() {
    let case = Case::new("aggregation", 4096, 1);
    let needle = case.head.needle().expect("planted");
    assert_eq!((needle.positions.len(), needle.answers.len(), needle.candidates), (360, 10, 30));
    assert!(needle.positions.windows(2).all(|w| w[0] < w[1]));
    // Half of the tokens are not enough for an exact count, but far better than chance.
    let partial = mean(case.weights(0).into_iter().map(|mut weights| {
        needle.positions.iter().step_by(2).for_each(|p| weights[*p] = 0.0);
        case.head.recall(&output(&weights, &case.values, D)).expect("planted")
    }));
    assert!((0.6..=1.0).contains(&partial), "{partial}");
    // Not finite is wrong, and wrong is 0.
    assert_eq!((case.head.recall(&[f32::NAN; D]), case.head.readout(&[f32::NAN; D])), (Some(0.0), None));
    let shape = shape(1, 4, 1);
    let rope = Rope::new(&shape, 3001);
    let mass = |text: &str| {
        let head = plan(text, &shape, 3000, 1, 5).calibrate(0, 0);
        let (keys, _) = context(&head, &rope);
        let query = prompt(&head, &rope, 2999..3000);
        softmax(&query[3 * D..][..D], &keys)[head.needle().expect("planted").positions[0]]
    };
    assert!(mass("needle:margin=4") > 0.8 && mass("needle:margin=4,asked=steps") < 0.05);
}
