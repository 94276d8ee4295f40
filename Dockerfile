# Two ways to one image:
#   docker build -t inference-proxy .    builds from source; nothing but Docker is needed
#   make image                           packs the static binary built on this machine (stage `local`)
# `local` stands before `build`: the classic builder runs the stages in order and stops at its target;
# BuildKit skips every stage its target does not need.

FROM scratch AS runtime
ARG VERSION=dev
LABEL org.opencontainers.image.title="inference-proxy" \
      org.opencontainers.image.description="Zero-config, Docker-label-driven reverse proxy for inference servers" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION"
EXPOSE 8080
# There is no shell and no curl in here: the binary checks itself. Docker's first check comes one interval after the
# start, and Traefik sends nothing before it, hence the short interval.
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 CMD ["/inference-proxy", "healthcheck"]
# No USER: the Docker socket belongs to root. compose.example.yml shows how to run as another user.
ENTRYPOINT ["/inference-proxy"]

FROM runtime AS local
# The star makes the binary optional, so that a classic `docker build .` from source passes through this stage too.
COPY LICENSE dist/inference-proxy* /

# glibc, linked statically, as in the binary that the tests run. Its resolver needs no files from the image.
FROM rust:1-bookworm AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY src src
RUN target="$(rustc -vV | sed -n 's/^host: //p')" \
 && RUSTFLAGS='-C target-feature=+crt-static' cargo build --locked --release --bin inference-proxy --target "$target" \
 && install -D "target/$target/release/inference-proxy" /out/inference-proxy

FROM runtime
COPY LICENSE /
COPY --from=build /out/inference-proxy /
