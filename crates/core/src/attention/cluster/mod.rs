//! `cluster`: clusters of similar keys; those that matter exactly, the others by their mass and mean value.
//!
//! A composition of published parts: segmented k-means and the zone of estimated tokens of RetroInfer (arXiv
//! 2505.02922), the choice by cumulated mass of Double-P (arXiv 2602.05191), tokens that fit no cluster kept apart, and
//! a second-order term with freezing for the mass of a cluster.
//!
//! **Index.** After the sinks the context is cut into segments. When one is complete, and all of it older than the
//! local window, its tokens are clustered from their stored rows (`build`); newer ones are read exactly until then. Of
//! a cluster are kept: the mean of its keys and of its values as 8-bit rows (both less the mean of the segment), its
//! size, the mean square distance of its keys from their mean, and its tokens. Tokens least like their neighbours
//! (`outliers`) belong to no cluster and are always read.
//!
//! **A step.** For each head `a = q . mean` and the variance of logits in a cluster, `v = energy * (q . r)^2 / |r|^2`
//! with the ratio over a sample of residuals `r` of all segments: how far logits spread depends on the direction of the
//! query. The mass is `exp(a + f) * size` with `f = v / 2`, or `sqrt(2 v ln size) - ln size` once `v > 2 ln size`: so
//! few tokens cannot realise more (random-energy model). What is read exactly anyhow is attended first. Then each head
//! takes, `by=error`, the clusters whose expected error `mass * sqrt((exp(v) - 1) / size)` exceeds `tau` of all mass;
//! or, `by=mass`, the fewest that leave less than `1 - p` of it. (Most clusters belong to the mass of a flat head,
//! though none of them causes an error.) 95 % of the mass of the sinks do not count there, for their values are small.
//! The group reads the union, at most `cap` of the context. The rest is the tail: its mass with the mean values of
//! clusters, or of the segment for clusters of less than `NEGLIGIBLE` of the mass.
//!
//! **Differences.** Segments are as long as those that RetroInfer adds while it generates: its first ones, of 8,192
//! tokens, would leave 4,096 to be read exactly on average. No query metric: an index must not depend on which queries
//! came. No cached rows in the order of clusters: the tokens of a cluster are read one by one. `calibrate` scales the
//! tail by (exact / estimated mass of what was selected) to that power; it needs the exact mass, so the method attends
//! to the selection itself. At 0, the default, the shared kernel does.
//!
//! **Cost** at `size=16` and 128 numbers a row: 11 bytes a token are scanned (144 a cluster), up to 8.25 more are mean
//! values; 21.5 bytes a token are kept. Rows: sinks, local, on average half a segment, outliers and the selection.
//! Clustering a segment takes 128 * segment^2 / size * 5 multiplications of bytes, in the step that completes it.
//!
//! Of arithmetic a cluster costs a group of four 1,024 products of bytes (queries of 16 bits are two planes), 7.1 a byte,
//! and for each head a square root and two exponentials. Tokens of clusters and outliers lie apart: at 98,304 tokens about
//! 3,300 rows of 512 bytes a KV head, copied together and read again. What is read anyhow, about 1,400 rows, the thread of
//! the KV head attends alone, because the choice needs its mass before anything else.

mod build;
mod index;
mod step;
#[cfg(test)]
mod tests;

use super::choose::union;
use super::params::{Kind, ParamSpec, Params};
use super::{Method, MethodShape, Predicted};
use step::Cluster;

pub(super) const METHOD: Method = Method {
    name: "cluster",
    summary: "k-means clusters of keys: the heaviest exactly, the rest by mass and mean value (RetroInfer, arXiv 2505.02922; \
              Double-P, arXiv 2602.05191)",
    params: &[
        ParamSpec {
            name: "p",
            summary: "share of the mass that is read exactly, for by=mass",
            kind: Kind::Float { min: 0.0, max: 1.0 },
            default: "0.95",
        },
        ParamSpec {
            name: "cap",
            summary: "largest share of the context that is read for its clusters",
            kind: Kind::Float { min: 0.0, max: 1.0 },
            default: "0.12",
        },
        ParamSpec {
            name: "by",
            summary: "what clusters are chosen by: their mass, or the error that they are expected to cause",
            kind: Kind::Choice(&["mass", "error"]),
            default: "error",
        },
        ParamSpec {
            name: "tau",
            summary: "expected error above which a cluster is read, as a share of the output, for by=error",
            kind: Kind::Float { min: 0.0, max: 1.0 },
            default: "0.002",
        },
        ParamSpec::sinks("16"),
        ParamSpec::local("128"),
        ParamSpec {
            name: "segment",
            summary: "tokens that are clustered together once they are complete",
            kind: Kind::Int { min: 64, max: 1 << 15 },
            default: "1024",
        },
        ParamSpec {
            name: "size",
            summary: "average number of tokens of a cluster",
            kind: Kind::Int { min: 2, max: 1024 },
            default: "16",
        },
        ParamSpec {
            name: "outliers",
            summary: "tokens of a segment that belong to no cluster and are always read",
            kind: Kind::Int { min: 0, max: 4096 },
            default: "8",
        },
        ParamSpec {
            name: "calibrate",
            summary: "power of the ratio of exact to estimated mass that scales the tail; 0: none",
            kind: Kind::Float { min: 0.0, max: 1.0 },
            default: "0",
        },
    ],
    settings: true,
    evicts: false,
    check,
    make: |p, place| Box::new(Cluster::new(p, &place.shape)),
    predict,
};

/// What decides the layout of the index.
#[derive(Clone, Copy, Debug)]
struct Shape {
    d: usize,
    sinks: usize,
    segment: usize,
    size: usize,
    outliers: usize,
}

impl Shape {
    fn new(p: &Params, d: usize) -> Self {
        let (sinks, segment) = (p.int("sinks"), p.int("segment"));
        Shape { d, sinks, segment, size: p.int("size"), outliers: p.int("outliers") }
    }

    /// Most clusters of a segment.
    fn clusters(&self) -> usize {
        self.segment / self.size
    }

    /// Residuals of a segment that are kept as a sample of all.
    fn samples(&self) -> usize {
        (self.segment / 128).clamp(4, 64)
    }
}

fn check(p: &Params, shape: &MethodShape) -> Result<(), String> {
    let ours = Shape::new(p, shape.head_dim);
    if !ours.d.is_multiple_of(8) || ours.d > 512 {
        return Err(format!(
            "a head dimension of {} cannot be indexed: it must be a multiple of 8, at most 512",
            ours.d
        ));
    }
    if 2 * ours.size > ours.segment {
        return Err(format!(
            "segment={} has not two clusters of size={}: make the segment larger or the clusters smaller",
            ours.segment, ours.size
        ));
    }
    if 4 * ours.outliers > ours.segment {
        return Err(format!(
            "outliers={} is more than a quarter of segment={}: that leaves too little to cluster",
            ours.outliers, ours.segment
        ));
    }
    Ok(())
}

fn predict(p: &Params, context: usize, shape: &MethodShape) -> Predicted {
    let ours = Shape::new(p, shape.head_dim);
    let segments = context.saturating_sub(ours.sinks + p.int("local")) / ours.segment;
    let clusters = segments * ours.clusters();
    // How many clusters are selected depends on the data; a tenth of what may be is usual for a head.
    let selected = (p.float("cap") * (segments * ours.segment) as f64 / 10.0) as usize;
    let selected = union(selected, shape.group, context);
    let exact = context - segments * (ours.segment - ours.outliers);
    let row = ours.d + 4;
    let segment_bytes = 8 * ours.d + ours.samples() * row;
    let state_bytes = clusters * (2 * row + 16) + segments * (2 * ours.segment + segment_bytes);
    Predicted {
        rows: (exact + selected).min(context),
        state_bytes,
        read_bytes: clusters * (row + 12 + row / 2) + segments * segment_bytes,
    }
}
