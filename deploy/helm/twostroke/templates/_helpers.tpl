{{/* Names, labels, and what several templates ask of the values. */}}

{{- define "twostroke.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "twostroke.fullname" -}}
{{- $name := include "twostroke.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{/* Labels that select pods: they never change. Give dict "root" $ "component" NAME. */}}
{{- define "twostroke.selector" -}}
app.kubernetes.io/name: {{ include "twostroke.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "twostroke.labels" -}}
{{ include "twostroke.selector" . }}
app.kubernetes.io/part-of: twostroke
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* Roles that are created, as a JSON list. */}}
{{- define "twostroke.roles" -}}
{{- $roles := list -}}
{{- range $role := list "prefill" "decode" "combined" -}}
{{- if (index $.Values $role).create }}{{ $roles = append $roles $role }}{{ end -}}
{{- end -}}
{{- $roles | toJson }}
{{- end }}

{{- define "twostroke.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default (printf "%s-%s" .Chart.AppVersion .Values.accelerator.type) $image.tag }}
{{- end -}}
{{- end }}

{{- define "twostroke.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "twostroke.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end }}

{{/* Where all routers are found, ready or not: a router is ready only when a worker has announced itself. */}}
{{- define "twostroke.routersAt" -}}
{{- if eq .Values.discovery.kind "endpointslices" -}}
k8s://{{ include "twostroke.fullname" . }}-routers.{{ .Release.Namespace }}:{{ .Values.ports.internal }}
{{- else -}}
{{ include "twostroke.fullname" . }}-routers:{{ .Values.ports.internal }}
{{- end -}}
{{- end }}

{{- define "twostroke.clusterKeySecret" -}}
{{ default (printf "%s-cluster-key" (include "twostroke.fullname" .)) .Values.clusterKey.secretName }}
{{- end }}

{{/* Resource name of a GPU; empty without one, or where claims give it. */}}
{{- define "twostroke.gpuResource" -}}
{{- if and (ne .Values.accelerator.type "cpu") (not .Values.dra.claimTemplates) -}}
{{ default (index .Values.accelerator.resources .Values.accelerator.type) .Values.gpuResource }}
{{- end -}}
{{- end }}

{{/* What cannot work, refused by name. */}}
{{- define "twostroke.check" -}}
{{- $roles := include "twostroke.roles" . | fromJsonArray -}}
{{- if not (or .Values.decode.create .Values.combined.create) -}}
{{- fail "decode.create and combined.create are false: no worker would decode; set one of them" -}}
{{- end -}}
{{- if .Values.planner.enabled -}}
{{- if eq .Values.mode "ray" -}}
{{- fail "planner.enabled is true in mode ray; the planner scales Deployments or the roles of a DisaggregatedSet: use mode deployments or disaggregatedset" -}}
{{- end -}}
{{- if not (and .Values.prefill.create .Values.decode.create) -}}
{{- fail "planner.enabled is true, and it plans prefill and decode workers; set prefill.create and decode.create" -}}
{{- end -}}
{{- if ne (int .Values.prefill.parallelism.tensor) (int .Values.decode.parallelism.tensor) -}}
{{- fail (printf "planner.enabled is true, prefill.parallelism.tensor is %v and decode.parallelism.tensor %v; a worker keeps its ranks when its role changes: give both the same" .Values.prefill.parallelism.tensor .Values.decode.parallelism.tensor) -}}
{{- end -}}
{{- range $role := list "prefill" "decode" -}}
{{- if ne (index $.Values $role).autoscaling.kind "none" -}}
{{- fail (printf "planner.enabled is true and %s.autoscaling.kind is %s; two owners of a number of pods would fight: set it to none" $role (index $.Values $role).autoscaling.kind) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.mode "disaggregatedset") (lt (len $roles) 2) -}}
{{- fail "mode disaggregatedset needs two roles at least; create prefill and decode, or use mode deployments" -}}
{{- end -}}
{{- $settings := .Values.config -}}
{{- $deterministic := ne (toString (dig "model" "deterministic" true $settings)) "false" -}}
{{- if and .Values.prefill.create .Values.decode.create $deterministic (ne (int .Values.prefill.parallelism.tensor) (int .Values.decode.parallelism.tensor)) -}}
{{- fail (printf "prefill.parallelism.tensor is %v and decode.parallelism.tensor %v: their sums differ in the last bits, and with model.deterministic only equal ones hand over; give both the same, or set config.model.deterministic to false" .Values.prefill.parallelism.tensor .Values.decode.parallelism.tensor) -}}
{{- end -}}
{{- range $role := $roles -}}
{{- $block := index $.Values $role -}}
{{- if gt (int $block.parallelism.tensor) 1 -}}
{{- if contains "/mig-" $.Values.gpuResource -}}
{{- fail (printf "%s.parallelism.tensor is %v with %s: a process uses one MIG slice, so tensor parallelism over slices is impossible; set it to 1" $role $block.parallelism.tensor $.Values.gpuResource) -}}
{{- end -}}
{{- if ne $.Values.accelerator.type "cpu" -}}
{{- fail (printf "%s.parallelism.tensor is %v with accelerator.type %s: GPUs have one tensor-parallel rank in this release; set it to 1, or accelerator.type to cpu" $role $block.parallelism.tensor $.Values.accelerator.type) -}}
{{- end -}}
{{- if or (dig "speculation" "method" "" $settings) (dig "speculation" "model" "" $settings) -}}
{{- fail (printf "%s.parallelism.tensor is %v, and config.speculation is given: speculation is served on one rank in this release; leave one of the two out" $role $block.parallelism.tensor) -}}
{{- end -}}
{{- if or (dig "model" "enable_lora" false $settings) (dig "model" "lora_modules" "" $settings) -}}
{{- fail (printf "%s.parallelism.tensor is %v, and config.model has adapters (enable_lora, lora_modules): they are served on one rank in this release; leave one of the two out" $role $block.parallelism.tensor) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $.Values.mode "ray") (ne $block.autoscaling.kind "none") -}}
{{- fail (printf "%s.autoscaling.kind is %s in mode ray, where KubeRay owns the pods; set ray.enableInTreeAutoscaling instead" $role $block.autoscaling.kind) -}}
{{- end -}}
{{- if and (gt (int $.Values.drainTimeoutSeconds) (int (default 86400 $block.terminationGracePeriodSeconds))) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds is %v, less than drainTimeoutSeconds (%v); leave it out, or set it above" $role $block.terminationGracePeriodSeconds $.Values.drainTimeoutSeconds) -}}
{{- end -}}
{{- end -}}
{{- end }}
