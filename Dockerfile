# syntax=docker/dockerfile:1

# An image with the binary cryo-connect, which runs as an unprivileged user:
#
#   docker build --tag cryo-connect .
#
# docs/operations/deployment.md describes how to run it.

FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY . .
ARG VERSION="" COMMIT="" DATE=""
# Static, because the image has no C library.
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 go build -trimpath -buildvcs=false \
    -ldflags "-s -w -X main.releaseVersion=$VERSION -X main.releaseCommit=$COMMIT -X main.releaseDate=$DATE" \
    -o /out/cryo-connect ./cmd/cryo-connect

# Certificates of the public CAs, time zones, /tmp and an unprivileged user; no shell.
FROM gcr.io/distroless/static-debian12:nonroot
ARG VERSION="" COMMIT="" DATE=""
LABEL org.opencontainers.image.title="cryo-connect" \
      org.opencontainers.image.description="Redpanda Connect's engine with inputs and outputs for the Cryo protocol" \
      org.opencontainers.image.source="https://github.com/cryo-connect/cryo-connect" \
      org.opencontainers.image.documentation="https://github.com/cryo-connect/cryo-connect/blob/main/docs/operations/deployment.md" \
      org.opencontainers.image.licenses="Apache-2.0 AND MIT AND LicenseRef-Redpanda-Community-License" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT" \
      org.opencontainers.image.created="$DATE"
COPY LICENSE /licenses/LICENSE
COPY --from=build /out/cryo-connect /cryo-connect
USER 65532:65532
# Scrapers and probes are outside the container.
ENV CRYO_CONNECT_HTTP_ADDRESS=0.0.0.0:4195
# 4195: metrics and health. 8080: Cryo clients of the examples.
EXPOSE 4195 8080
# Not /ready: a restart does not bring back a server that is down.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD [ "/cryo-connect", "probe" ]
ENTRYPOINT [ "/cryo-connect" ]
CMD [ "run", "/etc/cryo-connect/config.yaml" ]
