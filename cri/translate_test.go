package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/images"
)

// The kubelet dereferences attributes and metadata, and used_bytes.
// TestSizeOfAnImage: as fetched, but no more than its removal gives back, and never 0, which the kubelet refuses.
func TestSizeOfAnImage(t *testing.T) {
	for name, c := range map[string]struct {
		fetched   int64
		own, want uint64
	}{
		"compressed":                            {100, 250, 100},
		"compresses to more than it takes":      {100, 90, 90},
		"shares most of its layers with others": {100, 7, 7},
		"shares all of them":                    {100, 0, 1},
		"has no layers":                         {0, 0, 1},
		"of a manifest that lies":               {-5, 250, 1},
	} {
		if got := image(&images.Image{Size: c.fetched, Own: c.own}).Size; got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

func TestStatsAreNeverWithoutWhatTheKubeletDereferences(t *testing.T) {
	now := time.Unix(100, 0)
	got := containerStats(&pods.Container{ID: idA}, nil, images.Usage{}, true, now)
	if got.GetAttributes().GetMetadata() == nil || got.GetAttributes().GetId() != idA {
		t.Errorf("attributes %v", got.GetAttributes())
	}
	if got.GetWritableLayer().GetUsedBytes() == nil || got.GetWritableLayer().GetInodesUsed() == nil || got.GetWritableLayer().GetTimestamp() == 0 {
		t.Errorf("writable layer %v", got.GetWritableLayer())
	}
	if got.GetCpu() != nil || got.GetMemory() != nil {
		t.Error("a container that does not run uses CPU or memory")
	}
	if containerStats(&pods.Container{}, nil, images.Usage{}, false, now).GetWritableLayer() != nil {
		t.Error("a layer that was not counted has a size")
	}
}

func TestStatsCarryTheTimeOfTheReading(t *testing.T) {
	read := time.Unix(50, 7)
	usage := &cgroups.Stats{Time: read}
	usage.CPU.UsageNanos = 1
	usage.Memory.WorkingSet, usage.Memory.Available, usage.Memory.Usage, usage.Memory.RSS = 2, 3, 4, 5
	usage.CPU.Pressure = &cgroups.Pressure{Some: cgroups.Stall{TotalNanos: 12, Avg10: 1.5, Avg60: 2.5, Avg300: 3.5}}
	usage.Memory.Pressure = &cgroups.Pressure{Full: cgroups.Stall{TotalNanos: 13}}
	usage.IO.Pressure = &cgroups.Pressure{Some: cgroups.Stall{TotalNanos: 14}}
	usage.Memory.PageFaults, usage.Memory.MajorPageFaults, usage.Memory.SwapUsage, usage.Memory.SwapAvailable = 6, 7, 8, 9
	c := &pods.Container{ID: idA, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "n"}, Labels: map[string]string{"l": "1"}, Annotations: map[string]string{"a": "1"},
	}}
	got := containerStats(c, usage, images.Usage{Mountpoint: "/m", Bytes: 10, Inodes: 11}, true, time.Unix(60, 0))
	at := read.UnixNano()
	want := &cri.ContainerStats{
		Attributes: &cri.ContainerAttributes{Id: idA, Metadata: c.Config.GetMetadata(), Labels: c.Config.GetLabels(), Annotations: c.Config.GetAnnotations()},
		Cpu: &cri.CpuUsage{
			Timestamp: at, UsageCoreNanoSeconds: u64(1),
			Psi: &cri.PsiStats{Some: &cri.PsiData{Total: 12, Avg10: 1.5, Avg60: 2.5, Avg300: 3.5}, Full: &cri.PsiData{}},
		},
		Io: &cri.IoUsage{Timestamp: at, Psi: &cri.PsiStats{Some: &cri.PsiData{Total: 14}, Full: &cri.PsiData{}}},
		Memory: &cri.MemoryUsage{
			Timestamp: at, WorkingSetBytes: u64(2), AvailableBytes: u64(3), UsageBytes: u64(4), RssBytes: u64(5), PageFaults: u64(6), MajorPageFaults: u64(7),
			Psi: &cri.PsiStats{Some: &cri.PsiData{}, Full: &cri.PsiData{Total: 13}},
		},
		Swap: &cri.SwapUsage{Timestamp: at, SwapUsageBytes: u64(8), SwapAvailableBytes: u64(9)},
		WritableLayer: &cri.FilesystemUsage{
			Timestamp: time.Unix(60, 0).UnixNano(), FsId: &cri.FilesystemIdentifier{Mountpoint: "/m"}, UsedBytes: u64(10), InodesUsed: u64(11),
		},
	}
	if !proto.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	// What is left of no limit is not known: 0 would look like a container about to be killed.
	usage.Memory.Limit, usage.Memory.SwapLimit = cgroups.Unlimited, cgroups.Unlimited
	got = containerStats(c, usage, images.Usage{}, false, time.Unix(60, 0))
	if got.GetMemory().GetAvailableBytes() != nil || got.GetSwap().GetSwapAvailableBytes() != nil {
		t.Errorf("without limits there are left: %v, %v", got.GetMemory(), got.GetSwap())
	}
}

func TestImageUser(t *testing.T) {
	for user, want := range map[string]struct {
		uid  *cri.Int64Value
		name string
	}{
		"":          {},
		":5":        {},
		"0":         {uid: &cri.Int64Value{Value: 0}},
		"1002:1003": {uid: &cri.Int64Value{Value: 1002}},
		"www":       {name: "www"},
		"www:www":   {name: "www"},
		// It must not come out as "no user", which is root, nor as a small number.
		"99999999999999999999": {name: "99999999999999999999"},
		"4294967296":           {uid: &cri.Int64Value{Value: 4294967296}},
	} {
		uid, name := imageUser(user)
		if !proto.Equal(uid, want.uid) || name != want.name {
			t.Errorf("%q: %v %q, want %v %q", user, uid, name, want.uid, want.name)
		}
	}
}

func TestImageTranslation(t *testing.T) {
	img := &images.Image{
		ID: digest.Digest(imageID), RepoTags: []string{"a:1"}, RepoDigests: []string{"a@sha256:2"}, Size: 12, Own: 30, Pinned: true,
		Layers: []images.ChainID{"sha256:bottom", "sha256:top"},
	}
	img.Config.Config = ocispec.ImageConfig{User: "7"}
	got := image(img)
	if got.GetId() != imageID || got.GetRepoTags()[0] != "a:1" || got.GetRepoDigests()[0] != "a@sha256:2" || got.GetSize() != 12 || !got.GetPinned() || got.GetUid().GetValue() != 7 {
		t.Errorf("%v", got)
	}
	for own, want := range map[uint64]uint64{30: 12, 12: 12, 5: 5, 0: 1} {
		if img.Own = own; image(img).GetSize() != want {
			t.Errorf("removal gives back %d bytes, the size is %d, want %d", own, image(img).GetSize(), want)
		}
	}
	if i := newImageInfo(img); i.ChainID != "sha256:top" {
		t.Errorf("chain id %q", i.ChainID)
	}
	// The kubelet's client refuses an image of no size.
	for _, size := range []int64{0, -1} {
		if got := image(&images.Image{ID: digest.Digest(imageID), Size: size}); got.GetSize() == 0 || got.GetSize() > 1 {
			t.Errorf("size %d became %d", size, got.GetSize())
		}
	}
}

func TestEmptyCredentialsAreNone(t *testing.T) {
	if auth(nil) != nil || auth(&cri.AuthConfig{}) != nil {
		t.Error("an empty AuthConfig is not anonymous")
	}
	got := auth(&cri.AuthConfig{Username: "u", Password: "p", Auth: "a", ServerAddress: "s", IdentityToken: "i", RegistryToken: "r"})
	if *got != (images.Auth{Username: "u", Password: "p", Auth: "a", ServerAddress: "s", IdentityToken: "i", RegistryToken: "r"}) {
		t.Error("a credential was lost")
	}
}

func TestExecOutputFitsIntoAMessage(t *testing.T) {
	b := func(n int) []byte { return bytes.Repeat([]byte("x"), n) }
	for _, tc := range []struct{ out, err, wantOut, wantErr int }{
		{0, 0, 0, 0}, {5, 5, 5, 5}, {100, 0, 10, 0}, {0, 100, 0, 10}, {100, 100, 5, 5}, {100, 2, 8, 2}, {2, 100, 2, 8}, {5, 6, 5, 5},
	} {
		o, e := bound(b(tc.out), b(tc.err), 10)
		if len(o) != tc.wantOut || len(e) != tc.wantErr {
			t.Errorf("%d+%d bytes in 10: %d+%d, want %d+%d", tc.out, tc.err, len(o), len(e), tc.wantOut, tc.wantErr)
		}
	}
	o, e := bound(b(20<<20), b(20<<20), maxOutput)
	if size := proto.Size(&cri.ExecSyncResponse{Stdout: o, Stderr: e, ExitCode: math.MinInt32}); size > maxMessage {
		t.Errorf("a response of %d bytes is over the %d that the kubelet takes", size, maxMessage)
	}
}

// A liveness probe that comes back as DeadlineExceeded kills the container.
func TestOnlyTheCommandsOwnTimeoutIsADeadline(t *testing.T) {
	late := fmt.Errorf("dial: %w", context.DeadlineExceeded)
	for _, tc := range []struct {
		name          string
		err           error
		gone          bool
		timeout, took time.Duration
		deadline      bool
	}{
		{"timeout", context.DeadlineExceeded, false, time.Second, time.Second, true},
		{"ours, on the way", late, false, 10 * time.Second, time.Second, false},
		{"no timeout asked for", late, false, 0, time.Hour, false},
		{"the caller's", late, true, 0, time.Second, true},
	} {
		err := execError(tc.err, tc.gone, tc.timeout, tc.took)
		if got := code(err).String() == "DeadlineExceeded"; got != tc.deadline {
			t.Errorf("%s: %s", tc.name, code(err))
		}
	}
	if err := errdefs.ErrNotFound; !errors.Is(execError(err, false, 0, 0), err) {
		t.Error("another error was changed")
	}
}

func TestSeconds(t *testing.T) {
	for in, want := range map[int64]time.Duration{0: 0, 30: 30 * time.Second, math.MaxInt64: math.MaxInt64, math.MaxInt64 / int64(time.Second): 9223372036 * time.Second} {
		if got, err := seconds("timeout", in); err != nil || got != want {
			t.Errorf("%d: %v %v", in, got, err)
		}
	}
}
